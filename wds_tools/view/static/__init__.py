"""wds_tools/view/static"""
