"""Records -> samples: pairs, documents, conversations, codes. The list is what a converter of another package needs."""

from wds_tools.convert.options import Converter, ConvertOptions
from wds_tools.convert.run import run_conversion

__all__ = ["ConvertOptions", "Converter", "run_conversion"]
