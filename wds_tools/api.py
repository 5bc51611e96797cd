"""The commands as functions: each takes the config that its command line makes, and returns what came of it.

    from wds_tools.api import EncodeConfig, encode
    manifest = encode(EncodeConfig(input="sets/pairs", output="sets/codes", tokenizer="tiny"))

Imports all that they need, torch too. A job of your own needs `wds_tools.jobs` alone.
"""

from wds_tools.check.verify import VerifyConfig, VerifyResult, verify
from wds_tools.convert.coded import CodedConfig
from wds_tools.convert.conversations import ConversationsConfig
from wds_tools.convert.documents import DocumentsConfig
from wds_tools.convert.interleaved import InterleavedConfig
from wds_tools.convert.pairs import PairsConfig
from wds_tools.convert.run import run_conversion
from wds_tools.encode.encode import EncodeConfig, encode
from wds_tools.export.hf import export_hf
from wds_tools.export.options import ExportConfig, ExportSummary, ParquetConfig
from wds_tools.export.parquet import export_parquet
from wds_tools.jobs.finalize import FinalizeConfig, finalize
from wds_tools.pack.rows import PackConfig, pack
from wds_tools.select.relabel import RelabelConfig, relabel
from wds_tools.select.select import SelectConfig, select

__all__ = [
    "CodedConfig",
    "ConversationsConfig",
    "DocumentsConfig",
    "EncodeConfig",
    "ExportConfig",
    "ExportSummary",
    "FinalizeConfig",
    "InterleavedConfig",
    "PackConfig",
    "PairsConfig",
    "ParquetConfig",
    "RelabelConfig",
    "SelectConfig",
    "VerifyConfig",
    "VerifyResult",
    "encode",
    "export_hf",
    "export_parquet",
    "finalize",
    "pack",
    "relabel",
    "run_conversion",
    "select",
    "verify",
]
