"""One token through the model with the Triton kernels of `jrt.ops.steps`: four or five launches a layer.

    C   norm + in_proj + convolution + gate; out_proj + residual
    P L norm + projections; linear attention; out_proj + residual
    S A norm + Wqkv; rotary + attention (two for long texts); out_proj + residual
    M   norm + in_proj + convolution; x_proj; scan + gate; out_proj + residual
    MLP norm + fc1 + SwiGLU; fc2 + residual

Imported only where Triton is installed.

Shapes: B rows, E width or channels, H heads, d query/key size, D value or head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from jrt.decoding.states import ConvolutionInputs, KeyRing, LayerBuffers, LinearSums, MambaSums
from jrt.decoding.step import Step
from jrt.decoding.tables import feature_table
from jrt.mixers import Attention, LinearAttention, Mamba, ShortConvolution
from jrt.model import Block, LanguageModel, RMSNorm
from jrt.ops.steps import attention, choice, launch, linear_attention, mamba, products
from jrt.ops.steps.products import Taps
from jrt.ops.steps.stream import Norm, Stream, embed, embedded

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Launches a kernel on buffers that it holds. It must not hold the step: that would be a reference cycle, and keep GPU
# memory.
Launch = functools.partial[None]


def unsupported(model: LanguageModel) -> str | None:
    """The reason why the kernels cannot run this model; None if they can."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, nn.Linear) and module.in_features > launch.LONGEST:
            return f"{name} has {module.in_features} inputs; expected at most {launch.LONGEST}"
    dtype = model.embedding.weight.dtype
    if dtype not in DTYPES:
        return f"weights are {dtype}: expected one of {DTYPES}"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.dtype != dtype and not name.endswith((".A_log", ".D", ".dt_proj.bias")):
            return f"{name} is {parameter.dtype} and the embedding {dtype}: expected one dtype"
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return None


class FusedStep(Step):
    """A `Step` of Triton kernels. All of its tensors but the token ids are buffers that it owns; `advance` only
    launches.

    On a GPU, the kernels of all launches are compiled at the start, several at a time."""

    def __init__(self, model: LanguageModel, rows: int, capacity: int) -> None:
        super().__init__(model, rows, capacity)
        width, weight = model.config.width, model.embedding.weight
        self.stream, self.left = Stream.empty(rows, width, weight), embedded(width)
        self.scratch: dict[tuple[str, int], Tensor] = {}
        self.launches: list[Launch] = []
        for block, buffers in zip(self.blocks, self.buffers, strict=True):
            self._add_mixer(block, buffers)
            if hasattr(block, "mlp"):
                self._add_mlp(block)
        vocabulary = model.head.out_features
        self.logits = weight.new_zeros(rows, vocabulary)
        self._add(products.project, self.stream, self._norm(model.norm), [model.head.weight], None, self.logits)
        self.largest = torch.zeros(rows, choice.blocks(vocabulary), device=weight.device)
        self.places = torch.zeros_like(self.largest, dtype=torch.int32)
        self.tokens = torch.zeros(rows, dtype=torch.long, device=weight.device)
        if weight.is_cuda:
            self._compile()

    def advance(self, ids: Tensor) -> Tensor:
        embed(ids, self.model.embedding.weight, self.stream)
        for launch_one in self.launches:
            launch_one()
        # A kernel of PyTorch, which ends before the next step's kernels start (`launch.after_previous` relies on it).
        self.position.column.add_(1)
        return self.logits

    def likeliest(self, logits: Tensor) -> Tensor:
        choice.likeliest(logits, self.largest, self.places, self.tokens)
        return self.tokens

    def copies_of_z(self) -> int:
        heads = self.model.config.linear_heads
        return linear_attention.column_blocks(self.rows, heads, self.model.config.width // heads)

    def _compile(self) -> None:
        """Runs one launch of each kind, in threads. The buffers then hold anything."""
        stream = torch.cuda.current_stream(self.stream.x.device)
        embed(self.tokens, self.model.embedding.weight, self.stream)  # alone, because it initialises Triton
        self.likeliest(self.logits)
        kinds = {_kind(launch): launch for launch in self.launches}

        def run(launch_one: Launch) -> None:
            with torch.cuda.stream(stream):  # a thread starts with the default stream
                launch_one()

        with ThreadPoolExecutor(len(kinds)) as pool:
            list(pool.map(run, kinds.values()))

    def _add(self, function: Callable[..., None], *arguments: object) -> None:
        self.launches.append(functools.partial(function, *arguments))

    def _norm(self, module: RMSNorm) -> Norm:
        """The norm of what the launches so far leave in the stream."""
        return Norm(module.weight, module.eps, self.left)

    def _row(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """The (B, width) buffer with this name and width, which all layers share."""
        like = self.model.embedding.weight
        return self.scratch.setdefault((name, width), like.new_zeros(self.rows, width, dtype=dtype))

    def _add_mlp(self, block: Block) -> None:
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        hidden = self._row("hidden", fc2.in_features)
        self._add(products.swiglu, self.stream, self._norm(block.norm2), fc1.weight, fc1.bias, hidden)
        self._add_residual(hidden, fc2)

    def _add_residual(self, h: Tensor, linear: nn.Linear) -> None:
        self._add(products.add_product, h, linear.weight, linear.bias, self.stream)
        self.left = products.added(linear.weight, linear.bias, self.rows)

    def _add_mixer(self, block: Block, buffers: LayerBuffers) -> None:
        mixer, norm = block.mixer, self._norm(block.norm1)
        if isinstance(mixer, ShortConvolution):
            assert isinstance(buffers, ConvolutionInputs)
            self._add_convolution(mixer, norm, buffers)
        elif isinstance(mixer, LinearAttention):
            assert isinstance(buffers, LinearSums)
            self._add_linear_attention(mixer, norm, buffers)
        elif isinstance(mixer, Attention):
            assert isinstance(buffers, KeyRing)
            self._add_attention(mixer, norm, buffers)
        else:
            assert isinstance(mixer, Mamba) and isinstance(buffers, MambaSums)
            self._add_mamba(mixer, norm, buffers)

    def _add_convolution(self, mixer: ShortConvolution, norm: Norm, buffers: ConvolutionInputs) -> None:
        mixed = self._row("mixed", mixer.conv.out_channels)
        taps = Taps(mixer.conv.weight[:, 0], mixer.conv.bias, buffers.inputs)
        in_proj = mixer.in_proj
        self._add(products.convolution, self.stream, norm, in_proj.weight, in_proj.bias, taps, mixed)
        self._add_residual(mixed, mixer.out_proj)

    def _add_linear_attention(self, mixer: LinearAttention, norm: Norm, buffers: LinearSums) -> None:
        linears = [mixer.proj_q, mixer.proj_k, mixer.proj_v]
        decay = None
        if mixer.has_decay:
            linears.append(mixer.decay_proj)
            assert self.model.log_decay is not None
            decay = self.model.log_decay.float().exp()
        weights = [linear.weight for linear in linears]
        projected = self._row("projected", sum(linear.out_features for linear in linears))
        mixed = self._row("mixed", mixer.proj_v.out_features)
        d, gain = mixer.proj_q.out_features // mixer.heads, mixer.key_gain
        row, column, weight = feature_table(d, mixed.device)
        table = row, column, weight.float()
        S, z = buffers.S, buffers.z
        self._add(products.project, self.stream, norm, weights, None, projected)
        self._add(linear_attention.linear_attention_step, projected, S, z, table, d, gain, decay, mixed)
        self._add_residual(mixed, mixer.out_proj)

    def _add_attention(self, mixer: Attention, norm: Norm, buffers: KeyRing) -> None:
        qkv_proj, scale = mixer.Wqkv, mixer.scale
        width = qkv_proj.in_features
        qkv, mixed = self._row("projected", 3 * width), self._row("mixed", width)
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary.cos, self.rotary.sin, -(-self.model.config.rotary_dim // 2)
        k, v, position = buffers.k, buffers.v, self.position
        heads, ring, head_dim = k.shape[1:]
        parts = attention.parts(self.rows, heads, ring)
        partial = self._row(f"partial {parts}", heads * parts * (head_dim + 2), torch.float32)
        partial = partial.view(self.rows, heads, parts, head_dim + 2)
        self._add(products.project, self.stream, norm, [qkv_proj.weight], qkv_proj.bias, qkv)
        self._add(attention.attention_step, qkv, k, v, position.column, position.pads, rotary, scale, partial, mixed)
        self._add_residual(mixed, mixer.out_proj)

    def _add_mamba(self, mixer: Mamba, norm: Norm, buffers: MambaSums) -> None:
        channels = mixer.conv1d.out_channels
        u, gate, mixed = (self._row(name, channels) for name in ("u", "gate", "mixed"))
        selected = self._row("selected", mixer.x_proj.out_features)
        taps = Taps(mixer.conv1d.weight[:, 0], mixer.conv1d.bias, buffers.inputs)
        self._add(products.mamba_inputs, self.stream, norm, mixer.in_proj.weight, taps, u, gate)
        self._add(products.product, u, mixer.x_proj.weight, selected)
        self._add(
            mamba.selective_step,
            u, gate, selected, mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D, buffers.h, mixed,
        )  # fmt: skip
        self._add_residual(mixed, mixer.out_proj)


def _kind(launch_one: Launch) -> tuple:
    """Equal for launches that need the same compiled kernel."""
    return launch_one.func, *map(_form, launch_one.args)


def _form(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.stride()
    if isinstance(argument, (list, tuple)):
        return tuple(map(_form, argument))
    return argument
