"""Every container on the Hugging Face Hub, through hf:// and fsspec, against a stand-in on loopback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from commands import environment
from hub import TOKEN, serve_hub

READ_ALL = """
import json
from wds_tools.sources.folders import Folders, pictures_of
from wds_tools.sources.record import InputFile
from wds_tools.sources.tables import Tables
from wds_tools.sources.tars import Tars
from wds_tools.storage import join, open_store

url = "hf://datasets/me/set"
files = {name: InputFile(join(url, name), size) for name, size in open_store(url).list()}
pictures = sorted(pictures_of(files))
containers = [(Tars(), ["a.tar"]), (Tables(("text",)), ["data/b.parquet"]), (Folders(), pictures)]
for container, names in containers:
    for unit in container.units([files[name] for name in names]):
        print(json.dumps([record.fields for record in container.read(unit)], default=len))
"""


def test_tars_tables_and_folders_are_read_from_the_hub_and_only_what_is_wanted(tmp_path: Path) -> None:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("0.jpg", "0.txt", "1.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    table = pa.table({"text": ["x", "y"], "about": ["a" * (1 << 20), "b" * (1 << 20)]})
    pq.write_table(table, tmp_path / "b.parquet", compression="none", use_dictionary=False)
    with serve_hub() as hub:
        hub.files["a.tar"] = tar.getvalue()
        hub.files["data/b.parquet"] = (tmp_path / "b.parquet").read_bytes()
        hub.files["photos/1.jpg"], hub.files["photos/1.txt"] = b"jpeg", b"caption"
        env = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", READ_ALL]
        done = subprocess.run(command, env={**environment(), **env}, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [{"jpg": 3, "txt": "abc"}, {"txt": "abc"}],
        [{"text": "x"}, {"text": "y"}],
        [{"jpg": ["hf://datasets/me/set/photos/1.jpg"], "txt": "caption"}],
    ]
    assert sum(size for name, size in hub.reads if name == "data/b.parquet") < 500_000
