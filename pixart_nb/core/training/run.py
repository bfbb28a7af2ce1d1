"""``pixart-nb train``: from a training configuration to a trained pipeline or LoRA, on one or several workers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.config import TrainConfig, training_identity
from pixart_nb.core import backend
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.data.buckets import BucketSampler, Size, training_sizes
from pixart_nb.core.data.features import fingerprint, images_fingerprint
from pixart_nb.core.data.images import fit, load_image
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.core.data.reader import FeatureReader, LiveFeatures
from pixart_nb.core.errors import first_few
from pixart_nb.core.fast.recompute import recompute_activations
from pixart_nb.core.io import folder_lock, write_errors, write_json
from pixart_nb.core.lora import Adapter, Adapters, LoraConfig
from pixart_nb.core.lora.files import LAYOUTS
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.images import bins_for
from pixart_nb.core.training.batches import DiffusionBatches, Noise, caption_multiple, micro_conditions
from pixart_nb.core.training.checkpoints import CheckpointFolder
from pixart_nb.core.training.consistency import ConsistencyObjective
from pixart_nb.core.training.data import checked_data
from pixart_nb.core.training.distributed import SINGLE, Workers
from pixart_nb.core.training.distribution_matching import DistributionObjective
from pixart_nb.core.training.log import CurveLog, read_curve
from pixart_nb.core.training.loss import min_snr_weights
from pixart_nb.core.training.networks import FrozenNetworks, vae_encoder
from pixart_nb.core.training.objectives import ControlObjective, Objective
from pixart_nb.core.training.options import check_overflow_mode, steps_per_epoch, trainer_options
from pixart_nb.core.training.result import add_files, check_folder, check_result, write_result
from pixart_nb.core.training.trainer import Trainer, on_signal
from pixart_nb.core.training.validation import MAX_HELD_OUT, Validation, mean_loss, psnr, reconstruct
from pixart_nb.core.training.weak_to_strong import START_BATCHES, Start, start_from_config, start_report

#: Training images whose reconstruction by the VAE is measured before the first step.
_RECONSTRUCTED = 4
#: Value of ``objective`` -> what is minimized.
OBJECTIVES = {"diffusion": Objective, "lcm": ConsistencyObjective, "dmd": DistributionObjective}


class Training:
    """A training that is ready to run: ``for row in training.steps()``, then ``training.finish()``.

    Nothing is written to ``output_path`` before ``steps`` or ``session``, which lock it. Raises ``ConfigError``,
    ``DataError`` or ``CheckpointError`` for configurations, data and weights that cannot be used.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.folder = config, Path(config.output_path)
        fused = backend.on_ascend()
        self.workers = Workers(*backend.join_workers(), fused) if config.use_parallel else SINGLE
        check_overflow_mode(config)
        self.networks = FrozenNetworks(config)
        objective = ControlObjective if config.copy_blocks_num else OBJECTIVES[config.objective]
        self.result = self.folder / ("lora" if config.lora_rank else objective.result)
        check_result(self.result, self.networks.paths.values())
        if self.workers.is_main:
            check_folder(self.folder)
        checkpoint = self.networks.paths["transformer"]
        self.start: Start = start_from_config(config, checkpoint, self.networks.max_length)
        self.net, self.report = self.start.net, {}
        self.objective = objective(config, self.net)
        self.networks.check_latents(self.net.config)
        self.side = 8 * self.net.config.input_size
        self.labels = load_labels(config.json_path, config.image_dir)
        self.sizes = training_sizes(self.labels, self.side, config.multi_scale, config.valid_num)
        held_out = checked_data(config, self.labels, self.networks)
        CheckpointFolder(self.folder, 1).check_identity(self.identity)  # before hours of work on features
        rank, world = self.workers.rank, self.workers.size
        self.sampler = BucketSampler(self.sizes, config.batch_size, config.seed, rank, world)
        self.adapter = _add_adapter(self.net, config)
        self.batches = self._training_batches()
        validates = self.workers.is_main
        visual = config.visualize and validates
        self.validation = Validation(config, self.networks.embed, self.side, self.networks.control) if visual else None
        self.held_out = self._held_out(held_out) if held_out and validates else None
        self.trainer = self._trainer()
        if config.feature_cache:
            self.networks.release()

    # ---- parts

    def _training_batches(self) -> Callable:
        config, networks = self.config, self.networks
        if config.feature_cache:
            cache = networks.feature_cache(self.labels, self.sizes)
            networks.fill(cache, workers=self.workers)
            features = FeatureReader(cache, self.sampler, config.real_prompt_ratio)
            self.empty = cache.empty_caption()
        else:
            features = self._live_features(self.labels, self.sampler, config.num_parallel_workers)
            embeds, mask = networks.embed([""])
            self.empty = embeds[0][mask[0]]
        batches = self._with_noise(features, self.labels, self.sizes, config.class_dropout_prob)
        return self.adapter.with_dropout(batches, config.seed) if self.adapter else batches

    def _live_features(self, labels: list[Label], sampler: BucketSampler, ahead: int = 0) -> LiveFeatures:
        networks = self.networks
        return LiveFeatures(
            labels,
            sampler,
            self.config.real_prompt_ratio,
            vae_encoder(networks.vae),
            networks.embed,
            ahead,
            networks.control,
        )

    def _with_noise(
        self, features: FeatureReader | LiveFeatures, labels: list[Label], sizes: list[Size], caption_drop: float
    ) -> DiffusionBatches:
        config, vae, micro = self.config, self.networks.vae_config, None
        if self.net.config.micro_condition:
            bins = (bins_for(self.side) or {}) if config.multi_scale else {}
            originals = [(label.height, label.width) for label in labels]
            micro = micro_conditions(originals, sizes, {size: ratio for ratio, size in bins.items()})
        return DiffusionBatches(
            features,
            Noise(config.seed, config.timestep_sampling, config.noise_offset, caption_drop, self.objective.spacing),
            self.net,
            vae.scaling_factor,
            self.empty,
            first_row=self.workers.rank * config.batch_size,
            weights=min_snr_weights(config.snr_gamma) if config.snr_gamma else np.ones_like,
            length_multiple=caption_multiple(config.mode, self.networks.max_length),
            micro=micro,
            shift_factor=vae.shift_factor,
            extras=self.objective.extras,
        )

    def _held_out(self, labels: list[Label]) -> list[tuple]:
        """Return the batches of the validation loss: the same images, noise and timesteps every time."""
        config = self.config
        sizes = training_sizes(labels, self.side, config.multi_scale)
        sampler = BucketSampler(sizes, min(config.batch_size, len(labels)), config.seed)
        count = math.ceil(min(len(labels), MAX_HELD_OUT) / sampler.whole)
        batches = self._with_noise(self._live_features(labels, sampler), labels, sizes, 0.0)
        return [batches(number) for number in range(count)]

    def _trainer(self) -> Trainer:
        config, objective = self.config, self.objective
        dtype = backend.supported_dtype(dtype_from_name(config.dtype))
        objective.network.set_train(True)
        for parameter in (p for cell in objective.frozen for p in cell.get_parameters()):
            parameter.requires_grad = False
        half = (*objective.frozen, *([self.net] if self.adapter else [])) if dtype != ms.float32 else ()
        for parameter in (p for cell in half for p in cell.get_parameters()):
            parameter.set_dtype(dtype)
        recompute = config.recompute and (config.mode == 0 or dtype == ms.float32)
        if config.recompute and not recompute:  # MindSpore's backward pass mixes dtypes there
            tqdm.write("recompute is left out: in half precision it needs compiled graphs (mode 0)")
        trainer = Trainer(
            objective.loss(self.empty),
            self.adapter.parameters() if self.adapter else objective.parameters(),
            self.batches,
            trainer_options(config, self.sampler),
            self.folder,
            objective.names,
            network=objective.network,
            identity=self.identity,
            describe=self._describe_batch,
            workers=self.workers,
            tensorboard=config.tensorboard,
            dtype=ms.float32 if self.adapter else dtype,
            averages=objective.averages,
        )
        recompute_activations(objective.blocks if recompute else ())
        return trainer

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings, data, networks and architecture, which a resumed training has to share."""
        labels, controlnet = json.dumps([label.as_json() for label in self.labels]), self.config.controlnet
        control = self.networks.control
        conditions = map(control.file, self.labels) if control and control.folder else ()
        return training_identity(self.config, self.workers.size) | {
            "labels": hashlib.sha256(labels.encode()).hexdigest()[:16],
            "images": images_fingerprint(label.file for label in self.labels),
            **({"conditions": images_fingerprint(conditions) if control.folder else "edges"} if control else {}),
            "starting weights": fingerprint(self.networks.paths["transformer"]),
            **({"starting ControlNet": fingerprint(controlnet)} if controlnet else {}),
            "architecture": self.net.config.to_dict(),
            **self.networks.fingerprints(),
        }

    def _describe_batch(self, number: int) -> str:
        names = [self.labels[i].path for i in self.sampler.batch(number)[1]]
        return f"batch {number} ({first_few(names, 8)})"

    # ---- running

    @contextmanager
    def session(self) -> Iterator[None]:
        """Lock ``output_path``, write ``config.json`` and, before the first step, ``start.json``. Reentrant."""
        with self.trainer.session():
            if self.workers.is_main:
                write_json(self.folder / "config.json", self.config.model_dump())
                CurveLog(self.folder, self.trainer.step, name="held_out.csv")  # drops rows that are measured again
                if self.config.start_report and self.trainer.step == 0 and not self.report:
                    self.report = self._start_report()
                    write_json(self.folder / "start.json", self.report)
            yield

    def _start_report(self) -> dict[str, float]:
        batches = [self.batches(number) for number in range(START_BATCHES)]
        report = start_report(self.start, self.trainer.loss, batches)
        rows = range(min(_RECONSTRUCTED, len(self.labels)))
        images = [fit(load_image(self.labels[i].file), *self.sizes[i])[None] for i in rows]
        quality = [psnr(image, reconstruct(self.networks.vae, image)) for image in images]
        report["reconstruction_psnr"] = float(np.mean(quality))
        self._release_vae()
        return report

    def _release_vae(self) -> None:
        if self.config.feature_cache:
            self.networks.release("vae")

    def steps(self, bar: bool = False) -> Iterator[dict[str, Any]]:
        """Run the steps that are left and yield a row for each, as ``Trainer.steps`` does.

        After a validation the row also has ``images``, the paths of the validation images, and ``held_out_loss``. A
        validation before the first step of this call, at step 0 or where a process was stopped, has a row of its own.
        ``bar`` shows progress.
        """
        with self.session():
            step = self.trainer.step
            if self._validates_at(step) and not self._is_validated(step):
                yield {"step": step} | self.validate(step)
            with closing(self.trainer.steps(bar=bar)) as rows:
                for row in rows:
                    yield row | (self.validate(row["step"]) if self._validates_at(row["step"]) else {})

    def _validates_at(self, step: int) -> bool:
        config = self.config
        every = config.visualize_steps or steps_per_epoch(config, self.sampler) * config.visualize_interval
        last = self.trainer.options.steps
        return bool(self.validation or self.held_out) and (step % every == 0 or step == last)

    def _is_validated(self, step: int) -> bool:
        """Return whether the results of the validation at a step are complete."""
        images = self.validation.paths(self.folder / "samples", step) if self.validation else []
        rows = read_curve(self.folder / "held_out.csv") if self.held_out else []
        return all(map(Path.is_file, images)) and (not self.held_out or step in {row["step"] for row in rows})

    def validate(self, step: int) -> dict[str, Any]:
        """Sample the validation prompts and measure the held-out images, with the averages if there are any.

        Returns ``images``, their paths, and ``held_out_loss``, where the configuration asks for them.
        """
        results: dict[str, Any] = {}
        with self.trainer.ema_scope():
            network, scheduler = self.objective.network, self.objective.scheduler
            network.set_train(False)
            try:
                images = self.validation.sample(network, self.networks.vae, scheduler) if self.validation else None
                if self.held_out:
                    results["held_out_loss"] = mean_loss(self.trainer.loss, self.held_out)
            finally:
                network.set_train(True)
        self._release_vae()
        if images is not None:
            self.trainer.log.images(step, self.validation.prompts, images)
            results["images"] = self.validation.write(self.folder / "samples", step, images)
        if self.held_out:
            self.trainer.log.scalar(step, "held_out_loss", results["held_out_loss"])
            log = CurveLog(self.folder, step - 1, name="held_out.csv")
            log.write({"step": step, "held_out_loss": results["held_out_loss"]})
            log.sync()
        return results

    def finish(self) -> Path | None:
        """Write the trained pipeline or LoRA and return its folder, on the main worker."""
        if not self.workers.is_main:
            return None
        mark = {"step": self.trainer.step, "identity": json.loads(json.dumps(self.identity))}
        with self.session():
            return write_result(self.result, mark, self._write_lora if self.adapter else self._write)

    def _write_lora(self, folder: Path, replace: bool) -> None:
        with self.trainer.ema_scope():
            for layout in LAYOUTS:
                self.adapter.save(folder, layout)

    def _write(self, folder: Path, replace: bool) -> None:
        self.objective.write(folder, self.trainer.weights())
        if self.objective.result == "pipeline":
            self._write_pipeline(folder, replace)

    def _write_pipeline(self, folder: Path, replace: bool) -> None:
        """Write all of a pipeline but its transformer."""
        rest = {name: path for name, path in self.networks.paths.items() if name != "transformer"}
        if self.config.sd_scale_factor:
            del rest["vae"]
            components.write_vae(folder / "vae", self.networks.vae)
            self._release_vae()
        for name, path in rest.items():
            add_files(path, folder / name, replace)
        name = self.networks.pipeline_class(self.start.family)
        components.write_index(folder, self.objective.scheduler or self.networks.scheduler(), name)


def _add_adapter(net: PixArt, config: TrainConfig) -> Adapter | None:
    """Add the LoRA of a configuration, which is trained in place of the weights."""
    if not config.lora_rank:
        return None
    targets = {"target_modules": tuple(config.lora_target_modules)} if config.lora_target_modules else {}
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or None,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        **targets,
    )
    return Adapters.of(net).add("default", lora, config.seed)


def train(config: TrainConfig) -> Path | None:
    """Train with a progress bar; return the folder of the result on the main worker.

    Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved, ``WriteError`` for a full disk, and
    ``WorkerError`` if another worker is lost.
    """
    try:
        if Path(config.output_path).is_dir() and not config.use_parallel:
            with folder_lock(config.output_path):
                pass  # another training in the folder is noticed before anything is loaded
        training = Training(config)
        folder, stop = training.folder, training.trainer.request_stop
        with on_signal(stop), write_errors(folder, (folder,)), training.session():
            _print_rows(training)
            return training.finish()
    except RuntimeError as error:
        if config.use_parallel:
            raise backend.WorkerError(error) from error
        raise


def _print_rows(training: Training) -> None:
    if training.config.mode == 0 and (sizes := len(training.sampler.buckets)) > 1:
        tqdm.write(f"{sizes} training sizes: a graph is compiled for each of them when it first comes up")
    for name, value in training.report.items():
        tqdm.write(f"before the first step: {name} {value:.4g}")
    for row in training.steps(bar=True):
        for path in row.get("images", ()):
            tqdm.write(str(path))
        if "held_out_loss" in row:
            tqdm.write(f"step {row['step']}: held-out loss {row['held_out_loss']:.4g}")
