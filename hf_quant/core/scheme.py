"""Schemes: how a weight is quantized, as plain data without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hf_quant.core.k_quants import COLUMNS, K_QUANTS, KQuant
from hf_quant.core.scheme_names import equivalent
from hf_quant.errors import SchemeError

BITS = (2, 3, 4, 8)  # of codes that are made here
WIDTHS = tuple(range(2, 9))  # of codes that are read and run
LARGEST_GROUP = 1 << 16
MULTIPLE = 32  # of stored columns: 32 codes of any width fill whole int32 words
MOST_OUTLIERS = 0.1  # a larger share would be another precision
CODEBOOKS = ("nf4", "fp4", "e2m1", "nvfp4")  # of bitsandbytes, MXFP4 and NVFP4; no method here produces them
ACTIVATIONS = {
    "token": "",
    "tensor": "-static",
    "threshold": "-threshold",
}  # kinds of INT8 rounding, and their suffixes
THRESHOLD = 6.0  # of LLM.int8: an input column with such a large value stays in floating point
_SLUG = re.compile(
    r"W(?P<bits>\d)(A16|(?P<int8>A8)(?P<how>-static|-threshold)?)(-g(?P<group>\d{1,5}|-1))?(?P<asym>-asym(?P<real>-real)?)?(-(?P<codebook>nf4|fp4|e2m1|nvfp4))?(?P<permuted>-perm)?"
    r"(-o(?P<share>\d{1,2}(\.\d{1,4})?)%(?P<columns>-columns)?)?(-pad(?P<padding>[1-9]\d?))?",
    re.ASCII,
)


def fixed_zero(bits: int, asym: bool | None = None) -> bool:
    """Whether zero points are fixed: as ``asym`` says, or else from 4 bits on, since below stored ones earn their bytes.

    Rounded to nearest at 2 bits in groups of 64, the shipped model loses 1.1 nats a token without and 0.4 with them, for 0.04 bits
    a weight.
    """
    return bits not in (2, 3) if asym is None else not asym


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The quantization of one weight matrix ``[N, K]`` (out_features, in_features).

    ``codebook``, ``real_zero`` and ``permuted`` occur in checkpoints of other programs; no method of this package produces them.

    Args:
        bits: Width of one code, 2 to 8; 5, 6 and 7 occur in checkpoints of other programs.
        group_size: Consecutive input columns that share one scale, a power of two from 16; -1 means all K columns.
        symmetric: Whether the zero point is fixed at ``2 ** (bits - 1)`` and not stored.
        codebook: Name of a table of 16 levels that codes index, instead of a zero point: ``w = level[q] * scale``; ``"nvfp4"`` has
            the levels of ``"e2m1"``, and its scales are E4M3 codes (`core.coded_scales`). None for integers: ``w = (q - zero_point) * scale``.
        real_zero: Whether zero points are real numbers in the dtype of scales, as in HQQ, and not integers.
        permuted: Whether columns are stored in another order (GPTQ's act-order), so that groups are consecutive.
        outliers: Share of the weights that stay in floating point, 0 for none; at least one in each row.
        outlier_columns: Whether outliers are whole input columns (as in LLM.int8, arXiv:2208.07339, and OWQ,
            arXiv:2306.02272); if not, every row has its own, the same number in each.
        activations: How inputs are rounded to symmetric INT8; None for floating point. ``"token"``: each row by its largest value,
            at run time. ``"tensor"``: all by one scale from calibration. ``"threshold"``: by row, except columns with a value of 6
            or more anywhere in the batch, as in LLM.int8 (arXiv:2208.07339). The inputs of outlier columns stay in floating point.
        blocks: Name of a type of K-quants (`hf_quant.core.k_quants`), whose scales are whole multiples of one number for 256
            columns; the other fields are then its own (`of_blocks`). None for scales of any value.
        padding: Zero columns stored behind those of the weight, so that a K that is no multiple of 32 fills whole words (`fitted`).
            Methods here take ``in_features`` without them.

    Raises:
        SchemeError: A value is not supported.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    codebook: str | None = None
    real_zero: bool = False
    permuted: bool = False
    outliers: float = 0.0
    outlier_columns: bool = False
    activations: str | None = None
    blocks: str | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise SchemeError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {self.bits!r}")
        if self.blocks is not None:
            self._check_blocks()
        size = self.group_size
        if type(size) is not int or (size != -1 and (not 16 <= size <= LARGEST_GROUP or size & (size - 1))):
            raise SchemeError(f"group_size must be -1 or a power of two from 16 to {LARGEST_GROUP}, got {size!r}")
        if type(self.symmetric) is not bool:
            raise SchemeError(f"symmetric must be True or False, got {self.symmetric!r}")
        if self.codebook is not None and (self.codebook not in CODEBOOKS or self.bits != 4 or not self.symmetric):
            raise SchemeError(
                f"a codebook is one of {CODEBOOKS}, of 4 bits and without zero points, got {self.codebook!r}"
            )
        if self.outliers and self._unusual:
            raise SchemeError(f"{' and '.join(self._unusual)}: not with outliers")
        if self.real_zero and self.symmetric:
            raise SchemeError("real zero points cannot be symmetric")
        self._check_besides()

    def _check_besides(self) -> None:
        if type(self.outliers) not in (int, float) or not 0 <= self.outliers <= MOST_OUTLIERS:
            raise SchemeError(f"outliers must be a share from 0 to {MOST_OUTLIERS}, got {self.outliers!r}")
        if type(self.padding) is not int or not 0 <= self.padding < MULTIPLE or (self.padding and self.scale_bits):
            raise SchemeError(
                f"padding is 0 to {MULTIPLE - 1} columns, and 0 for scales in two levels, got {self.padding!r}"
            )
        if type(self.outlier_columns) is not bool or (self.outlier_columns and not self.outliers):
            raise SchemeError(
                f"outlier_columns must be True or False, True only with outliers, got {self.outlier_columns!r}"
            )
        if self.activations is not None and (self.activations not in ACTIVATIONS or self._unusual):
            raise SchemeError(
                f"activations must be one of {tuple(ACTIVATIONS)} or None, and None with what is foreign, got {self.activations!r}"
            )

    def _check_blocks(self) -> None:
        kind = K_QUANTS.get(str(self.blocks))
        if kind is None:
            raise SchemeError(f"blocks must be one of {tuple(K_QUANTS)} or None, got {self.blocks!r}")
        fields = (kind.bits, kind.group, not kind.offset, bool(kind.offset))
        more = self.outliers or self.activations or self.codebook or self.permuted
        if (self.bits, self.group_size, self.symmetric, self.real_zero) != fields or more:
            raise SchemeError(f"{self.blocks} has its own bits, groups and zero points, and nothing besides")

    @classmethod
    def of_blocks(cls, name: str) -> QuantScheme:
        """The scheme of a type of K-quants: ``QuantScheme.of_blocks("Q4_K")``."""
        kind = K_QUANTS[name]
        return cls(kind.bits, kind.group, not kind.offset, real_zero=bool(kind.offset), blocks=name)

    @property
    def k_quant(self) -> KQuant | None:
        """The type of K-quants; None for scales of any value."""
        return None if self.blocks is None else K_QUANTS[self.blocks]

    @property
    def scale_bits(self) -> tuple[int, int] | None:
        """Bits of the codes of scales and of offsets where scales are in two levels; None for scales of any value."""
        if (kind := self.k_quant) is not None:
            return (kind.scales[1] - kind.scales[0]).bit_length(), kind.offset.bit_length()
        return (8, 0) if self.codebook == "nvfp4" else None

    def units(self, in_features: int) -> int:
        """B, the parts of a row that have a number of their own where scales are in two levels."""
        return in_features // COLUMNS if self.blocks else 1

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return 0

    @property
    def qmax(self) -> int:
        """Largest code; codes run over ``qmin..qmax``."""
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns."""
        columns = self.columns(in_features)
        size = columns if self.group_size == -1 else self.group_size
        if self.blocks and columns % COLUMNS:
            raise SchemeError(
                f"blocks of {self.blocks} have {COLUMNS} columns, which does not divide in_features {in_features}"
            )
        if columns % size:
            raise SchemeError(f"group_size {size} does not divide in_features {columns}")
        return columns // size

    def packed_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed codes."""
        return self.columns(in_features) * self.bits // 8

    def zero_bytes(self, in_features: int) -> int:
        """Bytes of one row of packed zero points."""
        return -(-self.groups(in_features) * self.bits // 8)

    def outlier_count(self, in_features: int) -> int:
        """Outliers in a row of ``in_features`` columns."""
        return max(1, round(self.outliers * self.columns(in_features))) if self.outliers else 0

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Bits per weight for codes, scales, zero points, outliers and padding, without the indices of outlier columns."""
        groups = self.groups(in_features)
        if self.scale_bits is not None:
            wide = (16 if self.symmetric else 32) if self.blocks else 32
            return self.bits + (sum(self.scale_bits) * groups + wide * self.units(in_features)) / in_features
        zeros = 0 if self.symmetric else groups * scale_bits if self.real_zero else self.zero_bytes(in_features) * 8
        per_outlier = scale_bits if self.outlier_columns else scale_bits + 16
        extra = scale_bits * groups + zeros + per_outlier * self.outlier_count(in_features) + self.bits * self.padding
        return self.bits + extra / in_features

    def columns(self, in_features: int) -> int:
        """Stored columns of a row of ``in_features``: those and the padding."""
        return in_features + self.padding

    def fitted(self, in_features: int) -> QuantScheme:
        """This scheme with the padding that ``in_features`` needs, and the largest group size, not above its own, that divides both.

        Raises:
            SchemeError: ``in_features`` is not a multiple of the blocks of a K-quant, which are not padded.
        """
        if self.blocks:
            self.groups(in_features)
        size, padding = self.group_size, -in_features % MULTIPLE
        while size != -1 and (in_features + padding) % size:
            size //= 2
        return replace(self, group_size=size, padding=padding)

    @property
    def stored(self) -> QuantScheme:
        """The scheme of the stored matrix, where the padding is columns like all others."""
        return replace(self, padding=0) if self.padding else self

    @property
    def weights(self) -> QuantScheme:
        """The same scheme with activations in floating point."""
        return replace(self, activations=None)

    @property
    def needs_ranges(self) -> bool:
        """Whether quantization needs inputs: for the scale of activations, or to choose outlier columns."""
        return self.activations == "tensor" or (self.activations is not None and self.outlier_columns)

    @property
    def foreign(self) -> str | None:
        """The features that no method of this package produces, as a sentence; None if there are none."""
        names = self._unusual
        if self.bits not in BITS and not self.blocks:
            return f"{' and '.join([*names, f'codes of {self.bits} bits'])} can be read and run, not made; Q5_K and Q6_K can be made"
        return f"{' and '.join(names)} can be read and run, not made" if names else None

    @property
    def _unusual(self) -> list[str]:
        """What besides a width is foreign; it has neither outliers nor INT8 activations."""
        named = {f"a codebook ({self.codebook})": self.codebook, "real zero points": self.real_zero and not self.blocks,
                 "reordered columns": self.permuted}  # fmt: skip
        return [name for name, present in named.items() if present]

    def __str__(self) -> str:
        if self.blocks:
            return self.blocks
        kind = "" if self.symmetric else "-asym-real" if self.real_zero else "-asym"
        kind += (f"-{self.codebook}" if self.codebook else "") + ("-perm" if self.permuted else "")
        outliers = f"-o{round(100 * self.outliers, 4):g}%" if self.outliers else ""
        inputs = "A16" if self.activations is None else f"A8{ACTIVATIONS[self.activations]}"
        group = "" if self.activations and self.group_size == -1 else f"-g{self.group_size}"
        columns = "-columns" if self.outlier_columns else ""
        padding = f"-pad{self.padding}" if self.padding else ""
        return f"W{self.bits}{inputs}{group}{kind}{outliers}{columns}{padding}"

    @classmethod
    def parse(cls, slug: str) -> QuantScheme:
        """Inverse of ``str``: ``QuantScheme.parse("W4A16-g128-asym")``."""
        if isinstance(slug, str) and slug.upper() in K_QUANTS:
            return cls.of_blocks(slug.upper())
        match = _SLUG.fullmatch(slug) if isinstance(slug, str) else None
        if match is None or not (match["int8"] or match["group"]):
            hint = equivalent(slug) if isinstance(slug, str) else ""
            raise SchemeError(f"not a scheme: {slug!r}; {hint or 'write for example W4A16-g128-asym or W8A8'}")
        how = next(name for name, suffix in ACTIVATIONS.items() if suffix == (match["how"] or ""))
        share = round(float(match["share"] or 0) / 100, 6)
        return cls(
            int(match["bits"]), int(match["group"] or -1), match["asym"] is None,
            match["codebook"], match["real"] is not None, match["permuted"] is not None,
            share, bool(share and match["columns"]), how if match["int8"] else None, padding=int(match["padding"] or 0),
        )  # fmt: skip
