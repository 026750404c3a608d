"""Gene lists in common file formats are read, and other files are refused with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comtip_fast.cli.options import gene_list
from comtip_fast.inference.answers import _distinct

GENES = ["ERBB2", "CD74", "KRT17"]


@pytest.mark.parametrize(
    "content",
    [
        b"ERBB2\nCD74\nKRT17\n",
        b"ERBB2\nCD74\nKRT17",
        b"ERBB2\r\nCD74\r\nKRT17\r\n",
        b"\xef\xbb\xbfERBB2\nCD74\nKRT17\n",
        "ERBB2\nCD74\nKRT17\n".encode("utf-16"),
        b"ERBB2,CD74,KRT17\n",
        b"ERBB2, CD74,\nKRT17\n",
        b"ERBB2;CD74;KRT17",
        b"# markers\nERBB2 # HER2\n\nCD74\n  KRT17  \n",
        b"gene\nERBB2\nCD74\nKRT17\n",
        b"\xef\xbb\xbfGene_Symbol\nERBB2\nCD74\nKRT17\n",
        b'"x"\n"ERBB2"\n"CD74"\n"KRT17"\n',
        b"ERBB2\rCD74\rKRT17\r",
        b"rank,gene,score\n1,ERBB2,0.5\n2,CD74,0.25\n3,KRT17,0.1\n",
        b"gene\n# mine\nERBB2, CD74\nKRT17 # basal\n",
        b"gene\nERBB2\tCD74\tKRT17\n",
        b'"x"\n"1","ERBB2"\n"2","CD74"\n"3","KRT17"\n',
        b"gene,score\nr1,ERBB2,1\nr2,CD74,1\nr3,KRT17,1\n",
        b"gene_id\tp\nERBB2\t1e-9\nCD74\t1\nKRT17\t1\n",
    ],
)
def test_a_file_of_three_genes_is_three_genes(content: bytes, tmp_path: Path):
    path = tmp_path / "genes.txt"
    path.write_bytes(content)
    assert gene_list([f"@{path}"]) == GENES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no gene"),
        (b"\n\n", "names no gene"),
        (b"# nothing\n", "names no gene"),
        (b"gene\n", "names no gene"),
        (b"\xef\xbb\xbf", "names no gene"),
        (b"ERBB2\nCD74\xff\n", "not UTF-8 text"),
        (b"\x89HDF\r\n\x1a\n\0\0\xff", "not UTF-8 text"),
        (b"ERBB2\tHER2 receptor\n", "line 1: 'HER2 receptor' is not a gene name"),
        (b"ERBB2\nCD\x0074\n", "line 2"),
        (b"ERBB2,0.5\n", "line 1: '0.5' is not a gene name"),
        (b"the best gene\n", "line 1: 'the best gene' is not a gene name"),
        (b"A" * (5 << 20), "larger than 4 MiB"),
        (b"all\nERBB2\n", "all stands for all genes of the model"),
    ],
)
def test_a_file_that_is_not_a_gene_list_is_refused(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "genes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gene_list([f"@{path}"])


def test_other_values():
    assert gene_list(["all"]) is None
    assert gene_list(["ERBB2,CD74", "KRT17"]) == GENES
    for bad in (["all", "ERBB2"], ["ERBB2,all"]):
        with pytest.raises(ValueError, match="all stands for all genes of the model"):
            gene_list(bad)
    for bad in ([], [""], [","]):
        with pytest.raises(ValueError, match="names no gene"):
            gene_list(bad)


def test_paths_that_are_not_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--genes @.*: no such file"):
        gene_list([f"@{tmp_path / 'none'}"])
    with pytest.raises(ValueError, match="a folder"):
        gene_list([f"@{tmp_path}"])
    with pytest.raises(ValueError, match="larger than"):
        gene_list(["@/dev/zero"])
    reader, writer = os.pipe()  # as @<(grep ...) gives
    os.write(writer, b"ERBB2\nCD74\nKRT17\n")
    os.close(writer)
    assert gene_list([f"@/dev/fd/{reader}"]) == GENES
    os.close(reader)


@pytest.mark.parametrize("n", [2, 4_999, 5_000, 60_000])
def test_duplicate_genes_are_refused_in_lists_of_any_length(n: int):
    names = [f"G{i}" for i in range(n)]
    assert _distinct(names) == names
    with pytest.raises(ValueError, match="duplicate genes: G1"):
        _distinct([*names, "G1"])
