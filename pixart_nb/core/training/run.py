"""``pixart-nb train``: a configuration becomes a trained pipeline, in one process or, under msrun, in several."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindspore import ops
from tqdm.auto import tqdm

from pixart_nb.config import TrainConfig, training_identity
from pixart_nb.core import backend
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.data.buckets import BucketSampler, training_sizes
from pixart_nb.core.data.features import FeatureCache, FeatureReader, MadeBy, fingerprint, vae_encoder
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.core.data.reader import ImageReader
from pixart_nb.core.io import write_errors, write_json
from pixart_nb.core.lora import Adapter, Adapters, LoraConfig
from pixart_nb.core.training.batches import DiffusionBatches, Features, LiveFeatures, Noise, ReadAhead
from pixart_nb.core.training.curve_log import CurveLog
from pixart_nb.core.training.distributed import ALONE, join
from pixart_nb.core.training.held_out import MOST_PICTURES, HeldOut, require_apart
from pixart_nb.core.training.networks import Networks, scheduler_of
from pixart_nb.core.training.objective import NAMES, diffusion_loss, min_snr_weights
from pixart_nb.core.training.optim import scaled_rate
from pixart_nb.core.training.result import write_pipeline
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.core.training.validation import Validation, embed_prompts
from pixart_nb.core.training.weak_to_strong import (
    START_BATCHES,
    Stage,
    Start,
    start_afresh,
    start_report,
    start_stage,
)

#: Moments are kept in float32.
_NUMBERS_PER_KB = 1024 // 4


class Training:
    """A training that is ready to run: ``for row in training.steps()``, then ``training.finish()``.

    Raises ``ConfigError``, ``DataError`` or ``CheckpointError`` for what is wrong with the configuration, the data or
    the weights, before anything is computed.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_path)
        self.workers = join() if config.use_parallel else ALONE
        self.networks = Networks(config)
        self.start = self._start()
        self.net = self.start.net
        self.networks.check_latents(self.net.config)
        self.labels = load_labels(config.json_path, config.image_dir)
        sizes = training_sizes(
            self.labels, 8 * self.net.config.input_size, config.multi_scale, config.valid_num
        )
        rank, world = self.workers.rank, self.workers.size
        self.sampler = BucketSampler(sizes, config.batch_size, config.seed, rank, world)
        self.adapter = self._adapter()
        self.batches = self._batches(sizes)
        self.validation, self.held_out = self._validation(), self._held_out()
        self.trainer = self._trainer()
        self.report = self._report()
        if self.held_out:
            self.held_out_log = CurveLog(self.folder, self.trainer.step, name="held_out.csv")
        if self.workers.writes:
            write_json(self.folder / "config.json", config.model_dump())

    # ---- its parts

    def _start(self) -> Start:
        config = self.config
        compression = {
            "sampling": config.kv_compress_sampling,
            "scale_factor": config.kv_compress_scale_factor,
            "kv_compress_layer": config.kv_compress_layer,
        }
        stage = Stage(
            config.sample_size,
            config.pe_interpolation,
            compression if config.kv_compress else None,
            config.kv_compress_init,
        )
        where = self.networks.places["transformer"]
        if config.from_scratch:
            return start_afresh(where, stage, config.t5_max_length, config.seed, config.zero_cross_attention)
        return start_stage(where, stage, config.t5_max_length, config.seed)

    def _adapter(self) -> Adapter | None:
        """The LoRA that is trained in place of the weights, if one is."""
        config = self.config
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
        return Adapters.of(self.net).add("default", lora, config.seed)

    def _batches(self, sizes: list) -> Callable:
        config, networks = self.config, self.networks
        if config.feature_cache:
            features = self._cached(sizes)
            self.empty = features.cache.empty_caption()
        else:
            features = self._live(self.labels, self.sampler, config.num_parallel_workers)
            embeds, mask = networks.embed([""])
            self.empty = embeds[0][mask[0]]
        batches = self._noised(features, config.class_dropout_prob)
        return self.adapter.with_dropout(batches, config.seed) if self.adapter else batches

    def _live(self, labels: list[Label], sampler: BucketSampler, ahead: int = 0) -> LiveFeatures:
        """Features computed as they are needed, of pictures of which some are read ahead."""
        reader = ImageReader(labels, sampler, self.config.real_prompt_ratio)
        read = ReadAhead(reader.batch, ahead) if ahead else reader.batch
        return LiveFeatures(read, vae_encoder(self.networks.vae), self.networks.embed)

    def _noised(self, features: Features, caption_drop: float) -> DiffusionBatches:
        config = self.config
        return DiffusionBatches(
            features,
            Noise(config.seed, config.timestep_sampling, config.noise_offset, caption_drop),
            self.net,
            self.networks.vae.config.scaling_factor,
            self.empty,
            self.workers.rank * config.batch_size,
            min_snr_weights(config.snr_gamma) if config.snr_gamma else None,
            config.mode == 0,
        )

    def _cached(self, sizes: list) -> FeatureReader:
        config, networks = self.config, self.networks
        made_by = MadeBy(
            **networks.fingerprints(),
            max_length=config.t5_max_length,
            clean_caption=config.clean_caption,
            dtype=config.feature_dtype,
        )
        cache = FeatureCache(config.feature_cache, self.labels, sizes, made_by)
        if self.workers.writes and cache.unusable():
            cache.write(vae_encoder(networks.vae), lambda texts: networks.embed(texts))
        self.workers.total([0.0])  # the others wait here
        return FeatureReader(cache, self.sampler, config.real_prompt_ratio)

    def _validation(self) -> Validation | None:
        config, side = self.config, 8 * self.net.config.input_size
        if not (config.visualize and self.workers.writes):
            return None
        prompts = tuple(config.validation_prompts)
        negatives = config.validation_negative_prompts or [""] * len(prompts)
        return Validation(
            prompts,
            *embed_prompts(self.networks.embed, prompts, negatives),
            side,
            side,
            config.sampling_method,
            config.sampling_steps,
            config.guidance_scale,
            config.seed,
            {"sampling_steps": config.sampling_steps, "guidance_scale": config.guidance_scale},
        )

    def _held_out(self) -> HeldOut | None:
        """Pictures that are measured where others are drawn, and never trained on."""
        config = self.config
        if not (config.validation_json_path and self.workers.writes):
            return None
        labels = load_labels(config.validation_json_path, config.image_dir)
        require_apart(self.labels, labels)
        sizes = training_sizes(labels, 8 * self.net.config.input_size, config.multi_scale)
        sampler = BucketSampler(sizes, min(config.batch_size, len(labels)), config.seed)
        count = math.ceil(min(len(labels), MOST_PICTURES) / sampler.whole)
        return HeldOut(self._noised(self._live(labels, sampler), caption_drop=0.0), count)

    def _trainer(self) -> Trainer:
        config, net = self.config, self.net
        dtype = backend.supported_dtype(dtype_from_name(config.dtype))
        net.set_train(True)
        for parameter in net.get_parameters() if dtype != ms.float32 and self.adapter else ():
            parameter.set_dtype(dtype)
        for block in net.blocks if config.recompute else ():
            block.recompute()
        # the embedding of the empty caption is set, not trained, as in the official code
        parameters = {n: p for n, p in net.parameters_and_names() if n != "y_embedder.y_embedding"}
        return Trainer(
            diffusion_loss(net),
            self.adapter.parameters() if self.adapter else parameters,
            self.batches,
            self.options(),
            self.folder,
            NAMES,
            network=net,
            identity=self.identity(),
            describe=self.describe,
            workers=self.workers,
            tensorboard=config.tensorboard,
            dtype=ms.float32 if self.adapter else dtype,
        )

    def options(self) -> TrainerOptions:
        """How the trainer trains: the configuration, with epochs turned into updates."""
        config, accumulate = self.config, self.config.gradient_accumulation_steps
        pictures = self.sampler.whole * accumulate
        half = config.dtype == "fp16"
        return TrainerOptions(
            steps=config.steps or math.ceil(self.sampler.batches(config.epochs) / accumulate),
            start_learning_rate=scaled_rate(config.start_learning_rate, pictures, config.auto_lr),
            end_learning_rate=config.end_learning_rate,
            warmup_steps=config.warmup_steps,
            schedule=config.scheduler.removesuffix("_decay"),
            optimizer=config.optim,
            betas=tuple(config.came_betas if config.optim == "came" else config.adamw_betas),
            eps=tuple(config.came_eps) if config.optim == "came" else config.adamw_eps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm if config.clip_grad else None,
            ema_rate=config.ema_rate if config.use_ema else None,
            save_every=config.ckpt_save_steps or self._epoch * config.ckpt_save_interval,
            log_every=config.log_loss_interval,
            keep=config.ckpt_max_keep,
            compile=config.mode == 0,
            accumulate=accumulate,
            loss_scale=config.init_loss_scale if half else 1.0,
            dynamic_loss_scale=half and config.loss_scaler_type == "dynamic",
            loss_scale_factor=config.loss_scale_factor,
            loss_scale_window=config.scale_window,
            pictures=pictures,
            shard_threshold=sys.maxsize
            if config.hsdp_shard_size == 1
            else config.hsdp_threshold * _NUMBERS_PER_KB,
        )

    @property
    def _epoch(self) -> int:
        """Updates until every picture was seen about once."""
        return max(1, self.sampler.batches(1) // self.config.gradient_accumulation_steps)

    def identity(self) -> dict[str, Any]:
        """What a run that goes on with this one must share: settings, data, networks, architecture."""
        told = json.dumps([label.as_json() for label in self.labels])
        return training_identity(self.config, self.workers.size) | {
            "labels": hashlib.sha256(told.encode()).hexdigest()[:16],
            "starting weights": fingerprint(self.networks.places["transformer"]),
            "architecture": self.net.config.to_dict(),
            **self.networks.fingerprints(),
        }

    def describe(self, number: int) -> str:
        """The pictures of this worker's part of a batch."""
        names = [self.labels[i].path for i in self.sampler.batch(number)[1]]
        return f"batch {number} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"

    def _report(self) -> dict[str, float]:
        """The error at step 0, of a training that begins; written as ``start.json``."""
        if not (self.config.start_report and self.workers.writes and self.trainer.step == 0):
            return {}
        batches = [self.batches(number) for number in range(START_BATCHES)]
        report = start_report(self.start, self.trainer.loss, batches)
        write_json(self.folder / "start.json", report)
        return report

    # ---- running

    def steps(self, bar: bool = False) -> Iterator[dict[str, Any]]:
        """The steps that are left, one by one: rows as ``Trainer.steps`` yields them.

        Where validation pictures were drawn, the row has their paths as ``pictures``, and where pictures that are not
        trained on were measured, ``held_out_loss``; those of step 0 come as a row of their own, before the first step.
        ``bar`` shows progress.
        """
        total, looks = self.trainer.options.steps, bool(self.validation or self.held_out)
        if looks and self.trainer.step == 0:
            yield {"step": 0} | self.look(0)
        for row in self.trainer.steps(bar=bar):
            if looks and (row["step"] % self._visualize_every == 0 or row["step"] == total):
                row |= self.look(row["step"])
            yield row

    @property
    def _visualize_every(self) -> int:
        return self.config.visualize_steps or self._epoch * self.config.visualize_interval

    def look(self, step: int) -> dict[str, Any]:
        """Draw the validation prompts and measure the held-out pictures, with the weights as they are.

        They are averaged if averages are kept. Gives ``pictures``, their paths, and ``held_out_loss``, where asked for.
        """
        seen: dict[str, Any] = {}
        with self.trainer.averaged():
            self.net.set_train(False)
            drawn = self.validation.draw(self.net, self.networks.vae) if self.validation else None
            if self.held_out:
                seen["held_out_loss"] = self.held_out.loss(self.trainer.loss)
            self.net.set_train(True)
        if drawn is not None:
            self.trainer.log.pictures(step, self.validation.prompts, drawn)
            seen["pictures"] = self.validation.write(self.folder / "samples", step, drawn)
        if self.held_out:
            self.trainer.log.number(step, "held_out_loss", seen["held_out_loss"])
            self.held_out_log.write({"step": step, "held_out_loss": seen["held_out_loss"]})
        return seen

    def finish(self) -> Path | None:
        """Write what was trained: a pipeline, or a LoRA; its folder, on the worker that writes."""
        if not self.workers.writes:
            return None
        if self.adapter:
            for name, parameter in self.adapter.parameters().items():
                ops.assign(parameter, ms.Tensor(self.trainer.weights()[name]))
            self.adapter.save(self.folder / "lora")
            return self.folder / "lora"
        others = {name: place for name, place in self.networks.places.items() if name != "transformer"}
        vae = self.networks.vae if self.config.sd_scale_factor else None
        if vae is not None:
            del others["vae"]
        scheduler, weights = scheduler_of(self.config), self.trainer.weights()
        return write_pipeline(self.folder / "pipeline", self.net, weights, others, scheduler, vae)


def train(config: TrainConfig) -> Path | None:
    """Train as a configuration says, with a bar; the folder of what was trained, on the worker that writes.

    Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved, ``DataError`` for a full disk, and
    ``WorkerError`` if another worker is lost.
    """
    try:
        return _trained(Training(config))
    except RuntimeError as error:
        if config.use_parallel:
            raise backend.WorkerError(error) from error
        raise


def _trained(training: Training) -> Path | None:
    for name, value in training.report.items():
        tqdm.write(f"before the first step: {name} {value:.4g}")
    with write_errors(training.folder):
        for row in training.steps(bar=True):
            for path in row.get("pictures", ()):
                tqdm.write(str(path))
            if "held_out_loss" in row:
                tqdm.write(f"step {row['step']}: held-out loss {row['held_out_loss']:.4g}")
        if training.trainer.step < training.trainer.options.steps:
            raise KeyboardInterrupt(f"stopped at step {training.trainer.step}; run the same command to go on")
        return training.finish()
