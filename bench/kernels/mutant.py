"""A fault that ``mutate.py`` puts into a kernel, and the tests that must find those of each file."""

from __future__ import annotations

import re
from dataclasses import dataclass

INFONCE = "infonce/triton_kernels.py"
LOGITS = "infonce/logit_tiles.py"
TABLE = "sentence_table/triton_kernels.py"
ATTENTION = "packed_attention/triton_kernels.py"
ONE_QUERY = "one_query_attention/triton_kernels.py"
EMBEDDING = "gene_sentence_embedding/triton_kernels.py"
POINTWISE = "block_pointwise/triton_kernels.py"
ROUNDING = "interpreted/test_rounding.py"
TESTS = {
    INFONCE: ("test_infonce.py", "interpreted/test_blocks.py"),
    LOGITS: ("test_infonce.py", "interpreted/test_blocks.py"),
    TABLE: ("test_table.py", "interpreted/test_table.py"),
    ATTENTION: ("test_packed_attention.py", "test_image_attention.py"),
    ONE_QUERY: ("test_one_query_attention.py",),
    EMBEDDING: ("interpreted/test_gene_sentence_embedding.py", "test_gene_sentence_embedding.py"),
    POINTWISE: ("test_block_pointwise.py",),
}
QUICK = {
    INFONCE: "(equals_the_reference and 40-71-48) or (hostile and fp32) or beyond_the_end or (wide and 600 and all)",
    LOGITS: "(equals_the_reference and 40-71-48) or (hostile and fp32) or beyond_the_end or (wide and 600 and all)",
    TABLE: "(equals_the_reference and size2) or (wide and 600) or beyond_the_end",
    ATTENTION: "(equals_the_reference and size1) or only_its_sentence or only_its_image or (plain_pytorch and 17) or a_bias_of_sentences",
    ONE_QUERY: "(equals_the_reference and sorted and size1) or only_its_sentence or without_a_query or (bf16 and dtypes)",
    EMBEDDING: "two_rounds or (equals_the_reference and size1) or beyond_the_end",
    POINTWISE: "(plain_pytorch and (129 or 1100)) or only_its_row",
}
"""{file: expression for ``pytest -k`` that selects tests which kill most mutants}; the other tests run only if these pass."""


@dataclass(frozen=True)
class Mutant:
    """One fault: an expression of a kernel and its replacement."""

    file: str
    """File below ``kernels/comtip_kernels``."""
    kernel: str
    """Name of the function."""
    kind: str
    """Kind of the fault, for reports."""
    old: str
    """Expression that occurs once in the function."""
    new: str

    @property
    def name(self) -> str:
        """Kernel and kind of the fault."""
        return f"{self.kernel}: {self.kind}"

    def tests(self) -> tuple[str, ...]:
        """Return the test files of which one test must fail."""
        return (ROUNDING,) if self.kind == "dtype" else TESTS[self.file]

    def apply(self, source: str) -> str:
        """Return the source of the file with the fault.

        Raises
        ------
        ValueError
            The expression does not occur exactly once in the kernel.
        """
        found = re.search(rf"^def {self.kernel}\(.*?(?=\n\n\n|\Z)", source, flags=re.DOTALL | re.MULTILINE)
        if found is None or found[0].count(self.old) != 1:
            count = 0 if found is None else found[0].count(self.old)
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {count} times in {self.file}; update bench/kernels/mutate.py"
            )
        return source[: found.start()] + found[0].replace(self.old, self.new) + source[found.end() :]


def of(file: str, kernel: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    """Return the mutants of one function, by kind, expression and replacement."""
    return [Mutant(file, kernel, *fault) for fault in faults]
