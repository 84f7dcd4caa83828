"""What a model is, in numbers, checked once when it is built."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """Every rotation frequency is divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float

    def __post_init__(self) -> None:
        check_real("rope_scaling.factor", self.factor, low=1e-6, high=1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, smooth in between.

    Attributes:
        factor: divisor of the lowest frequencies.
        low_freq_factor: wavelengths above original_max_position_embeddings / low_freq_factor are divided.
        high_freq_factor: wavelengths below original_max_position_embeddings / high_freq_factor are kept.
        original_max_position_embeddings: length of the model's first training.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_real(f"rope_scaling.{name}", getattr(self, name), low=1e-6, high=1e6)
        check_whole(
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            high=ModelConfig.MAX_POSITIONS,
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope_scaling.high_freq_factor must be above rope_scaling.low_freq_factor")


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorRope:
    """Each frequency has its own divisor, `[head_dim / 2]`, as GGUF files of Llama 3.x carry them."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            check_real("rope_scaling.factors", factor, low=1e-6, high=1e6)


RopeScaling = LinearRope | Llama3Rope | FactorRope


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Llama family.

    Attributes:
        architecture: the Hugging Face class, one of ARCHITECTURES; for messages and for saving.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: elements per head, even.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotation frequencies.
        rope_scaling: None: as the base gives them.
        tie_word_embeddings: the head is the embedding.
        qkv_bias: the q, k and v projections have a bias (Qwen2).
        out_bias: the attention's output projection has a bias (Llama with attention_bias).
        qk_norm: q and k are normalised per head before the rotation (Qwen3).
        sliding_window: a query at position p attends to positions > p - sliding_window; None: to all.
        max_position_embeddings: tokens the model was made for.
        bos_token_id: None: the model has none.
        eos_token_ids: tokens that end a sequence, may be empty.

    Raises:
        ValueError: a number that is no number, out of bounds or contradicts another; names the field.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    ARCHITECTURES: ClassVar[tuple[str, ...]] = (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    )
    # Generous for any dense model that one host can hold, small enough that no product overflows.
    MAX_VOCAB: ClassVar[int] = 1 << 22
    MAX_POSITIONS: ClassVar[int] = 1 << 27
    MAX_WIDTH: ClassVar[int] = 1 << 19
    MAX_HEADS: ClassVar[int] = 1 << 10
    MAX_LAYERS: ClassVar[int] = 1 << 10

    def __post_init__(self) -> None:
        check_architecture(self.architecture)
        check_whole("vocab_size", self.vocab_size, high=self.MAX_VOCAB)
        check_whole("hidden_size", self.hidden_size, high=self.MAX_WIDTH)
        check_whole("intermediate_size", self.intermediate_size, high=self.MAX_WIDTH)
        check_whole("num_layers", self.num_layers, high=self.MAX_LAYERS)
        check_whole("num_heads", self.num_heads, high=self.MAX_HEADS)
        check_whole("num_kv_heads", self.num_kv_heads, high=self.MAX_HEADS)
        check_whole("head_dim", self.head_dim, high=1024)
        check_whole("max_position_embeddings", self.max_position_embeddings, high=self.MAX_POSITIONS)
        check_real("rms_norm_eps", self.rms_norm_eps, low=0.0, high=1.0)
        check_real("rope_theta", self.rope_theta, low=1.0, high=1e15)
        for name in ("tie_word_embeddings", "qkv_bias", "out_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.sliding_window is not None:
            check_whole("sliding_window", self.sliding_window, high=self.MAX_POSITIONS)
        if self.bos_token_id is not None:
            check_whole("bos_token_id", self.bos_token_id, low=0, high=self.vocab_size - 1)
        for token in self.eos_token_ids:
            check_whole("eos_token_id", token, low=0, high=self.vocab_size - 1)
        if isinstance(self.rope_scaling, FactorRope) and len(self.rope_scaling.factors) != self.head_dim // 2:
            raise ValueError(
                f"rope_scaling.factors has {len(self.rope_scaling.factors)} entries,"
                f" head_dim {self.head_dim} needs {self.head_dim // 2}"
            )

    @property
    def queries_per_kv(self) -> int:
        """G: query head h attends with KV head h // G."""
        return self.num_heads // self.num_kv_heads


def check_architecture(name: object) -> None:
    """Raise ValueError unless `name` is an architecture of ours."""
    if name not in ModelConfig.ARCHITECTURES:
        known = ", ".join(ModelConfig.ARCHITECTURES)
        raise ValueError(f"architecture {shown(name)} is not supported; supported: {known}")


def check_whole(name: str, value: object, *, low: int = 1, high: int) -> int:
    """Return `value` if it is an integer in [low, high], else raise ValueError naming the field."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {shown(value)}")
    return value


def check_real(name: str, value: object, *, low: float, high: float) -> float:
    """Return `value` if it is a finite number in [low, high], else raise ValueError naming the field."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    # Also false for NaN; an integer too large for a float compares, but does not convert.
    if not low <= value <= high:
        raise ValueError(f"{name} must be a finite number between {low:g} and {high:g}, got {shown(value)}")
    return float(value)


def shown(value: object) -> str:
    """`repr`, short enough for one line of a message."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
