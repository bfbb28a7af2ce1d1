"""Operators that a step dispatches on Ascend, counted on a CPU: ``make ascend-audit``.

Small networks take the Ascend path with stand-ins for its operators. MindSpore's debug log names every operator that
PyNative dispatches, and MindSpore's Ascend library those that have an aclnn kernel; the others take the older, slower
path of single operators. The number for XL/2 is that of one block times 28 and the rest: the number of operators of a
block depends neither on its width nor on the size of the image. **No time is measured.**
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

DEPTH = 28
#: Most operators of a denoising step of XL/2 with guidance, by image size.
LIMITS = {256: 900, 512: 900, 1024: 1100, 2048: 1500}
#: KV compression of all blocks: operator and ratio.
COMPRESSIONS = {
    "no compression": (None, 1),
    "conv 2": ("conv", 2),
    "conv 4": ("conv", 4),
    "mean 2": ("mean", 2),
    "ave 2": ("ave", 2),
}
#: Names in the log that are no kernel: views of a tensor, and conversions that call Cast.
VIEWS = {
    "Reshape", "ExpandDims", "Squeeze", "Transpose", "BroadcastTo", "StridedSlice", "Split", "SplitTensor", "Chunk",
}  # fmt: skip
CASTS = {"ToDtype"}
#: Operators without an aclnn kernel, and why they stay.
REASONS = {"StopGradient": "no kernel: it marks where a gradient ends, once in the loss"}
_LINE = re.compile(r"Run Pyboost_(\w+?) start|RunOp name: (\w+)|ProcessViewOp\] Start, op:(\w+)|^##(.*)")


@dataclass
class Section:
    """Operators and reads to the host between two marks."""

    operators: Counter = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of dispatched operators, views included."""
        return self.operators.total()

    def old_path(self) -> Counter:
        """Operators that have no aclnn kernel."""
        return Counter({name: n for name, n in self.operators.items() if path_of(name) == "old path"})

    def __sub__(self, other: Section) -> Section:
        difference = Counter(self.operators)
        difference.subtract(other.operators)
        return Section(Counter({name: n for name, n in difference.items() if n}))


def path_of(operator: str) -> str:
    """Return how Ascend runs an operator: as a ``view``, by ``aclnn`` or on the ``old path``."""
    if operator.removesuffix("View").removesuffix("Ext") in VIEWS or operator.endswith("View"):
        return "view"
    return "aclnn" if operator in aclnn_kernels() or operator in CASTS else "old path"


@cache
def aclnn_kernels() -> frozenset[str]:
    """Return the operators that MindSpore's Ascend library has an aclnn kernel for."""
    import mindspore

    library = Path(mindspore.__file__).parent / "lib/plugin/libmindspore_ops_ascend.so"
    classes = re.finditer(rb"N9mindspore6kernel7pyboost(\d+)(\w+)", library.read_bytes())
    names = {match[2][: int(match[1])].decode() for match in classes}
    return frozenset(name.removesuffix("Ascend") for name in names if name.endswith("Ascend"))


# ---- the process that runs the cases


def mark(text: str) -> None:
    """Write a line into the log."""
    os.write(2, f"##{text}\n".encode())


def recorded(name: str, stand_in: Callable) -> Callable:
    """Return a stand-in that stands in the log as one operator, and as one more in the gradient."""
    from mindspore import nn, ops

    from benchmarks.ascend_stand_ins import STAND_INS

    forward, backward = KERNELS[name]

    class Recorded(nn.Cell):
        def construct(self, *inputs):
            mark(f"KERNEL {forward}")
            out = ops.zeros_like(inputs[0]) if name in SAME_SHAPE else stand_in(*inputs)
            mark("END")
            return out

        def bprop(self, *inputs):
            mark(f"KERNEL {backward}")
            zeros = tuple(ops.zeros_like(x) if hasattr(x, "asnumpy") else 0 for x in inputs[:-2])
            mark("END")
            return zeros

    cell, signature = Recorded(), inspect.signature(STAND_INS[name])

    def call(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        return cell(*bound.args)

    return call


#: Kernels of each function of ``models.ascend_operators`` and of its gradient.
KERNELS = {
    "layer_norm": ("LayerNormExt", "LayerNormGradExt"), "rms_norm": ("RmsNorm", "RmsNormGrad"),
    "gelu_tanh": ("GeluExt", "GeluGradExt"), "addcmul": ("AddcmulExt", "AddcmulExt"),
    "conv2d": ("Conv2DExt", "ConvolutionGrad"), "pad": ("ConstantPadND", "ConstantPadND"),
    "embedding": ("Embedding", "EmbeddingDenseBackward"),
    "flash_attention_score": ("FlashAttentionScore", "FlashAttentionScoreGrad"),
}  # fmt: skip


#: Functions whose result has the shape of their first argument: zeros are enough to count.
SAME_SHAPE = ("layer_norm", "rms_norm", "gelu_tanh", "addcmul", "flash_attention_score")


def _small_net(depth: int, side: int = 16, operator: str | None = None, ratio: int = 1, dtype: str = "float16"):
    from pixart_nb.core.backend import ms
    from pixart_nb.core.models.transformer import PixArt, PixArtConfig

    compression = dict(sampling=operator, scale_factor=ratio, kv_compress_layer=list(range(depth)))
    config = PixArtConfig(
        hidden_size=72, num_heads=1, depth=depth, caption_channels=64, input_size=side,
        kv_compress_config=compression if operator else None,
    )  # fmt: skip
    net = PixArt(config)
    net.initialize(np.random.default_rng(0))
    for parameter in net.get_parameters():
        parameter.set_dtype(getattr(ms, dtype))
    return net


def _denoise(depth: int, size: int, operator: str | None, ratio: int) -> None:
    """Two denoising steps with guidance; the second is counted."""
    from pixart_nb.core.backend import ms
    from pixart_nb.core.sampling.guidance import guided_model
    from pixart_nb.core.sampling.text import Conditioning

    rng = np.random.default_rng(0)
    prompt, negative = (ms.Tensor(rng.standard_normal((1, n, 64)).astype(np.float32)) for n in (20, 1))
    condition = Conditioning(prompt, np.ones((1, 20), bool), negative, np.ones((1, 1), bool))
    latents = rng.standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
    predict = guided_model(_small_net(depth, size // 8, operator, ratio), condition, 4.5, size, size)
    predict(latents, 900.0)
    mark(f"SECTION denoise {size} {operator} {ratio} {depth}")
    predict(latents, 500.0)


def _encode_text() -> None:
    from pixart_nb.core.backend import ms
    from pixart_nb.core.models.t5 import T5Config, T5Encoder

    for layers in (1, 2):
        t5 = T5Encoder(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=layers))
        t5.initialize(np.random.default_rng(0))
        for parameter in t5.get_parameters():
            parameter.set_dtype(ms.float16)
        mark(f"SECTION T5 with {layers} of 24 layers")
        t5(np.arange(40).reshape(2, 20), np.ones((2, 20), bool))


def _decode() -> None:
    from pixart_nb.core.backend import ms
    from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig

    vae = AutoencoderKL(VAEConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=8))
    vae.initialize(np.random.default_rng(0))
    mark("SECTION VAE decoder")
    vae.decode(np.ones((1, 4, 16, 16), np.float32))
    vae.enable_tiling(64)
    mark("SECTION VAE decoder, 9 tiles")
    vae.decode(np.ones((1, 4, 16, 16), np.float32))
    vae.disable_tiling()
    mark("SECTION VAE encoder")
    vae.encode(ms.Tensor(np.ones((1, 3, 64, 64), np.float32)))


def _train() -> None:
    """Loss and gradients of one block, and one update with its clipping."""
    from pixart_nb.core.backend import ms
    from pixart_nb.core.training import optimizers
    from pixart_nb.core.training.loss import coefficients, diffusion_loss
    from pixart_nb.core.training.optimizers import AdamW, clip_by_norm, global_norm

    optimizers._fused_adamw = lambda *arguments: [mark("KERNEL AdamW"), mark("END")]  # not registered on a CPU

    rng = np.random.default_rng(0)
    for depth in (1, 2):
        net = _small_net(depth)
        net.set_train(True)
        parameters = {k: p for k, p in net.parameters_and_names() if k != "y_embedder.y_embedding"}
        gradient = ms.value_and_grad(diffusion_loss(net), None, list(parameters.values()), has_aux=True)
        x, caption = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 16, 16), (2, 20, 64)))
        mask = np.arange(20)[None] < np.array([[20], [5]])
        table = coefficients(np.array([5, 7]))
        batch = [x, x, table, np.array([5.0, 7.0], np.float32), caption, mask, np.ones(2, np.float32)]
        arguments = [ms.Tensor(part) for part in batch] + [net.positions(16, 16)]
        mark(f"SECTION training, loss and gradients of {depth} of 28 blocks")
        (loss, *_), gradients = gradient(*arguments)
        loss.asnumpy()
    masters = {name: ms.Parameter(p.astype(ms.float32), name=f"master.{name}") for name, p in parameters.items()}
    optimizer = AdamW(masters)
    mark(f"SECTION training, AdamW update of {len(masters)} tensors")
    clipped = clip_by_norm(gradients, global_norm(gradients), 1.0)
    optimizer.update(dict(zip(masters, clipped, strict=True)), 1e-4)


def run_cases(names: list[str]) -> None:
    """Run cases with the Ascend path; the log has a mark before each."""
    from benchmarks.ascend_stand_ins import ascend
    from pixart_nb.core.backend import ms

    read = ms.Tensor.asnumpy

    def asnumpy(tensor):
        caller = sys._getframe(1)
        if "mindspore" not in caller.f_code.co_filename:
            mark(f"READ {Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
        return read(tensor)

    ms.Tensor.asnumpy = asnumpy
    with ascend(wrap=recorded):
        for name in names:
            kind, *options = name.split()
            if kind == "denoise":
                depth, size, operator, ratio = options
                _denoise(int(depth), int(size), None if operator == "None" else operator, int(ratio))
            else:
                {"text": _encode_text, "vae": _decode, "train": _train}[kind]()
            mark("SECTION end")


# ---- the process that reads the log


def parse(log: str) -> dict[str, Section]:
    """Return the sections of a log, by name."""
    sections: dict[str, Section] = {}
    section, within = Section(), False
    for line in log.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        word, _, rest = (match[4] or "").partition(" ")
        if word == "SECTION":
            section = sections.setdefault(rest, Section())
        elif word == "READ":
            section.reads += [] if within else [rest]
        elif word in ("KERNEL", "END"):
            within = word == "KERNEL"
            section.operators.update([rest] if within else [])
        elif not within:
            section.operators.update([match[1] or match[2] or match[3]])
    return sections


def sections_of(cases: list[str]) -> dict[str, Section]:
    """Run cases in a process of their own and return what each dispatched."""
    environment = os.environ | {"GLOG_v": "0", "PIXART_NB_PIN_THREADS": "0", "PIXART_NB_DEVICE": "CPU"}
    command = [sys.executable, "-m", "benchmarks.ascend_audit", "--run", *cases]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]
        raise RuntimeError("the cases failed:\n" + "\n".join(lines[-30:]))
    return parse(done.stderr)


@dataclass(frozen=True)
class StepCount:
    """Operators of a denoising step of XL/2: of one block and of the rest."""

    size: int
    compression: str
    block: Section
    rest: Section
    reads: list[str]

    @property
    def count(self) -> int:
        """Operators of the whole step, views included."""
        return DEPTH * self.block.count + self.rest.count


def count_steps(sizes=tuple(LIMITS), compressions=tuple(COMPRESSIONS)) -> list[StepCount]:
    """Count the operators of a denoising step for every size and compression."""
    keys = [(size, name, *COMPRESSIONS[name]) for size in sizes for name in compressions]
    cases = [f"denoise {depth} {size} {operator} {ratio}" for size, _, operator, ratio in keys for depth in (1, 2)]
    sections = sections_of(cases)
    steps = []
    for size, name, operator, ratio in keys:
        one, two = (sections[f"denoise {size} {operator} {ratio} {depth}"] for depth in (1, 2))
        steps.append(StepCount(size, name, two - one, one - (two - one), two.reads))
    return steps


def step_table(steps: list[StepCount]) -> tuple[Table, list[str]]:
    """Return the table of denoising steps, and the steps that are above a limit."""
    headings = "size", "compression", "per block", "the rest", "step", "at most", "old path in blocks", "reads"
    table, bad = Table(*headings, title="Operators of a denoising step of XL/2 with guidance"), []
    for step in steps:
        limit, old, reads = LIMITS[step.size], dict(step.block.old_path()), len(step.reads)
        if step.count > limit or old or reads != 1:
            bad.append(f"{step.size}, {step.compression}")
        row = step.size, step.compression, step.block.count, step.rest.count, step.count, limit, old or "none", reads
        table.add_row(*map(str, row))
    return table, bad


def operator_table(name: str, section: Section) -> tuple[Table, list[str]]:
    """Return the table of the operators of a section, and those on the old path that have no reason."""
    title = f"{name}: {section.count} operators, {len(section.reads)} reads"
    table, bad = Table("operator", "number", "path", "why", title=title), []
    for operator, number in section.operators.most_common():
        path = path_of(operator)
        reason = REASONS.get(operator, "") if path == "old path" else ""
        if path == "old path" and not reason:
            bad.append(f"{name}: {operator}")
        table.add_row(operator, str(number), path, reason)
    return table, bad


def main() -> None:
    """Print all tables; exit with an error above a limit or for an operator without a reason."""
    console = Console(width=150)
    tables = [step_table(count_steps())]
    sections = sections_of(["text", "vae", "train"])
    tables += [operator_table(name, section) for name, section in sections.items() if name != "end"]
    for table, _ in tables:
        console.print(table)
    bad = [place for _, places in tables for place in places]
    if bad:
        sys.exit("above a limit, or without a reason: " + "; ".join(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_cases(sys.argv[2:])
    else:
        main()
