"""Base class of the modules in this package: a pretrained transformer, its optimizer and its schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import nn

from evertune._lightning import Callback, LightningModule, clip_in_bf16, either, rank_zero_warn
from evertune.lightning_modules.adapters import PROMPTS, adapter_config, add_adapters
from evertune.lightning_modules.backbone import (
    Attention,
    accepted_inputs,
    depths,
    freeze,
    load_backbone,
    skeleton,
)
from evertune.lightning_modules.prompts import Prompt
from evertune.lightning_modules.rank_allocation import RankAllocation
from evertune.lightning_modules.saving import (
    BACKBONE,
    REST,
    WEIGHTS,
    SavedModule,
    holds_adapters,
    load_rest,
    name_in_transformer,
    read_manifest,
    whole_state,
    write_manifest,
)
from evertune.lightning_modules.schedule import (
    Schedule,
    check_schedule,
    learning_rate_factor,
    learning_rate_for,
    remaining_steps,
)
from evertune.tasks.texts import max_tokens
from evertune.utils.loaders import resume_loaders
from evertune.utils.locate import locate
from evertune.utils.pretrained import load_tokenizer
from evertune.utils.ranks import barrier, is_writer


class TransformerModule(LightningModule):
    """A pretrained transformer that learns one update after another.

    The weights are loaded in ``configure_model``, which Lightning calls in every ``fit`` and which only loads once;
    this way, DeepSpeed ZeRO-3 never holds a whole model on one device. Outside a trainer, call it yourself. A subclass
    adds the head in ``configure_head`` and the loss in ``training_step``.

    Each ``fit`` is one update with its own schedule: the learning rate is warmed up again and decays again (Ibrahim et
    al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models"). Weights train in fp32;
    pass ``precision="bf16-mixed"`` to the trainer for bf16.

    Args:
        model_name_or_path: Name on the Hugging Face hub, folder, or ``package:NAME/FOLDER`` (in an installed package).
        learning_rate: Peak learning rate of AdamW, reached at the end of the warm-up. None (default) chooses it by the
            size of the transformer (:func:`~evertune.lightning_modules.schedule.learning_rate_for`): 5e-5 for one of
            BERT's size, 2e-4 for MiniLM, which learns too little in a short update with 5e-5.
        head_learning_rate: Peak learning rate of the layers on top of the transformer. None (default): the same.
        layer_decay: Factor of the learning rate from each layer of the transformer to the one below it, in (0, 1]; the
            embeddings are below the first (Howard & Ruder 2018; Clark et al. 2020 have 0.8). Default: 1, one rate.
        weight_decay: Weight decay of AdamW; biases and norms are exempt. Default: 0.01.
        warmup_ratio: Share of an update's steps used for the warm-up, in [0, 1). Default: 0.1.
        schedule: ``linear`` (default) or ``cosine`` decay; ``infinite``, a constant rate with a cool-down at the end,
            whose shape up to there does not depend on the length of the update (Hägele et al. 2024); or ``constant``,
            the only one for a ``fit`` without an end.
        final_ratio: Share of the peak at which an update ends, and from which the next one warms up, in [0, 1): so the
            rate is continuous from update to update. Default: 0; Ibrahim et al. have 0.1.
        cooldown_ratio: Share of an update's steps used for the cool-down of ``infinite``, in (0, 1]. Default: 0.2.
        freeze_layers: 0 (default) trains everything, n freezes the embeddings and the first n layers, -1 freezes the
            whole transformer and trains only the head.
        unfreeze_ratio: Share of an update's steps over which the layers join the training from top to bottom, in [0, 1)
            (gradual unfreezing, Howard & Ruder 2018): the layers on top from the first step, the embeddings last, at
            equal distances. Until a layer joins, its learning rate is 0, which moves no weight on any strategy; it
            costs what full training costs, and the optimizer's averages and the clipping know its gradients from the
            first step. Each update starts again from the top. Default: 0, all from the first step.
        freeze_word_embeddings: Whether to freeze the word embeddings, which saves time and memory (half of MiniLM's
            weights) and keeps rare words as they are. Default: False.
        dropout: Replaces every dropout probability of the model; None (default) keeps the model's own.
        attention: Implementation of attention, ``sdpa`` or ``eager``. ``auto`` (default) is the model's own, or what is
            fastest on the machine with :class:`~evertune.callbacks.Fastest`, which
            ``ContinualTrainer(precision="auto")`` adds.
        peft: Adapters to train instead of the transformer, as settings of PEFT: ``{"method": "lora", "r": 8,
            "target_modules": ["query", "value"]}``, with ``"use_dora": True`` for DoRA, ``{"method": "adalora"}``
            (:class:`~evertune.lightning_modules.rank_allocation.RankAllocation`) or ``{"method": "ia3"}``; for
            ``target_modules``, PEFT knows defaults for many transformers. ``{"method": "bottleneck",
            "reduction_factor": 16}`` needs no PEFT (:class:`~evertune.lightning_modules.bottleneck.Bottleneck`). Or
            virtual tokens: ``{"method": "prompt_tuning", "num_virtual_tokens": 20}``, ``p_tuning``, ``prefix_tuning``
            (:class:`~evertune.lightning_modules.prompts.Prompt`). The layers on top are trained in full. Default:
            None, none.

    Raises:
        ModuleNotFoundError: If ``peft`` needs PEFT, and it is not installed.
        ValueError: If an argument is out of range; the message names the allowed values.
    """

    backbone: Any
    """The transformer, without a head; None until ``configure_model``."""
    prompt: Prompt | None
    """Virtual tokens that are trained instead of the transformer, if ``peft`` says so."""
    takes_prompts = True
    """Whether virtual tokens may be put before the texts."""
    _head_ignores_norms = False  # weight decay would then only make its steps larger

    def __init__(
        self,
        model_name_or_path: str,
        *,
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        layer_decay: float = 1.0,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        schedule: Schedule = "linear",
        final_ratio: float = 0.0,
        cooldown_ratio: float = 0.2,
        freeze_layers: int = 0,
        unfreeze_ratio: float = 0.0,
        freeze_word_embeddings: bool = False,
        dropout: float | None = None,
        attention: Attention = "auto",
        peft: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if learning_rate is not None and learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate}")
        if head_learning_rate is not None and head_learning_rate < 0:
            raise ValueError(f"head_learning_rate must not be negative, got {head_learning_rate}")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        check_schedule(schedule, warmup_ratio, final_ratio, cooldown_ratio)
        if freeze_layers < -1:
            raise ValueError(f"freeze_layers must be -1 (all), 0 (none) or a number of layers, got {freeze_layers}")
        if not 0 <= unfreeze_ratio < 1:
            raise ValueError(f"unfreeze_ratio must be in [0, 1), got {unfreeze_ratio}")
        if unfreeze_ratio and freeze_layers == -1:
            raise ValueError(f"unfreeze_ratio={unfreeze_ratio} with freeze_layers=-1, which leaves no layers to join")
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {list(get_args(Attention))}, got {attention!r}")
        if peft is not None:
            adapter_config(peft)
            if peft["method"] in PROMPTS and not self.takes_prompts:
                raise ValueError(
                    f"peft: {peft['method']} puts virtual tokens before a text, and {type(self).__name__} generates "
                    "texts, which is not supported; use lora, adalora, ia3 or bottleneck"
                )
            if freeze_layers:
                raise ValueError(
                    f"freeze_layers={freeze_layers} with peft, which freezes the whole transformer: leave it out, or "
                    "limit the adapters to some layers with layers_to_transform in peft"
                )
        self.save_hyperparameters()
        self.model_name_or_path = locate(str(model_name_or_path))
        self.learning_rate = learning_rate
        self.head_learning_rate = head_learning_rate
        self.layer_decay = layer_decay
        self.weight_decay = weight_decay
        self.warmup_ratio = warmup_ratio
        self.schedule = schedule
        self.final_ratio = final_ratio
        self.cooldown_ratio = cooldown_ratio
        self.freeze_layers = freeze_layers
        self.unfreeze_ratio = unfreeze_ratio
        self.freeze_word_embeddings = freeze_word_embeddings
        self.dropout = dropout
        self.attention = attention
        self.peft = None if peft is None else dict(peft)
        self.backbone = None
        self.prompt = None
        self._tokenizer: Any = None
        self._saved: Path | None = None

    def keep_hparams_of(self, cls: type[TransformerModule]) -> None:
        """Drop from ``hparams`` what the constructor of a class does not take, since the class fixes it."""
        own = inspect.signature(cls).parameters
        self.remove_ignored_hparams([name for name in self.hparams if name not in own])

    # --- the model

    def configure_model(self) -> None:
        """Load the transformer and build the head. Later calls have no effect."""
        if self.backbone is not None:
            return
        with self._zero_3():
            backbone = self.load_backbone()
        self.build(backbone)

    def build(self, backbone: Any) -> None:
        """Build the module around a transformer: freeze what is not trained, add the head and the adapters."""
        self.backbone = backbone
        freeze(self.backbone, self.freeze_layers)
        if self.freeze_word_embeddings:
            self.backbone.get_input_embeddings().requires_grad_(False)
        self._inputs = accepted_inputs(self.backbone)
        self.configure_head()
        saved_with = self._saved is not None and holds_adapters(self._saved)
        if saved_with:
            self.configure_adapters()
        if self._saved is not None:
            load_rest(self, self._saved)
        if not saved_with:
            self.configure_adapters()

    def configure_adapters(self) -> None:
        """Freeze the transformer and add what is trained in its place, if ``peft`` says so."""
        if self.peft is None:
            return
        if self.peft["method"] in PROMPTS:
            self.backbone.requires_grad_(False)
            self.prompt = Prompt(self.backbone, self.peft)
        else:
            add_adapters(self.backbone, self.peft)

    def configure_callbacks(self) -> list[Callback]:
        """The callback that allocates the ranks of AdaLoRA, if ``peft`` says so."""
        return [RankAllocation(self.peft)] if self.peft is not None and self.peft["method"] == "adalora" else []

    def load_backbone(self) -> Any:
        """The pretrained transformer, in training mode. By default one without a head."""
        return load_backbone(self.model_name_or_path, self.dropout, self.attention)

    def skeleton(self) -> Any:
        """The transformer of :meth:`load_backbone` without weights, on torch's meta device."""
        return skeleton(self.model_name_or_path, dropout=self.dropout)

    def configure_head(self) -> None:
        """Build the layers on top of ``self.backbone``. By default there are none."""

    def encode(self, **inputs: Any) -> Any:
        """Run the transformer on the inputs that it accepts; other columns of a batch are ignored.

        Raises:
            RuntimeError: Before the weights are loaded.
            ValueError: If the texts have more tokens than the transformer takes.
        """
        if self.backbone is None:
            raise RuntimeError(f"{type(self).__name__} has no weights yet: call configure_model() first")
        tokens = inputs.get("input_ids")
        if tokens is not None and self.max_tokens is not None and tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"a batch has texts of {tokens.shape[1]} tokens, but {type(self.backbone).__name__} takes at most "
                f"{self.max_tokens}: tokenize with truncation=True, max_length={self.max_tokens}"
            )
        accepted = {name: value for name, value in inputs.items() if name in self._inputs}
        return self.backbone(**accepted) if self.prompt is None else self.prompt(self.backbone, accepted)

    @cached_property
    def max_tokens(self) -> int | None:
        """The maximum number of tokens of a text, special tokens included; None if the transformer has no maximum.

        Virtual tokens leave less room.
        """
        most = max_tokens(skeleton(self.model_name_or_path) if self.backbone is None else self.backbone)
        if most is None or self.peft is None or self.peft["method"] not in PROMPTS:
            return most
        return most - int(adapter_config(self.peft).num_virtual_tokens)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded on first access.

        Without a padding token, it pads with its end token. Its ``model_max_length`` is at most :attr:`max_tokens`.

        Raises:
            ValueError: If the model has no tokenizer.
        """
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.model_name_or_path)
            if len(tokenizer) <= len(tokenizer.all_special_tokens):  # the fallback of transformers if files are missing
                raise ValueError(f"{self.model_name_or_path} has no tokenizer files")
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.model_max_length = min(tokenizer.model_max_length, self.max_tokens or tokenizer.model_max_length)
            self._tokenizer = tokenizer
        return self._tokenizer

    def _zero_3(self) -> Any:
        """A context in which transformers partitions each weight with DeepSpeed while loading it."""
        strategy = self._trainer.strategy if self._trainer is not None else None
        if not (isinstance(strategy, either("DeepSpeedStrategy")) and strategy.zero_stage_3):
            return nullcontext()
        from transformers.integrations import HfDeepSpeedConfig

        # transformers keeps a weak reference: the settings hold for as long as this object lives
        return nullcontext(HfDeepSpeedConfig(strategy.config))

    # --- the optimizer

    def configure_optimizers(self) -> Any:
        """AdamW without decay on biases and norms, and a schedule that restarts with each ``fit``.

        Raises:
            ValueError: If the schedule requires the length of ``fit`` and it is unknown.
        """
        rate = self.learning_rate or self.default_learning_rate()
        head_rate = rate if self.head_learning_rate is None else self.head_learning_rate
        depth_of = depths(self.backbone) if self.layer_decay < 1 or self.unfreeze_ratio else {}
        groups: dict[tuple[int, float, float], list[nn.Parameter]] = {}  # by depth, learning rate and decay
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                in_head = not name.startswith(BACKBONE)
                decayed = _n_dimensions(parameter) > 1 and not (in_head and self._head_ignores_norms)
                depth = -1 if in_head else depth_of.get(name.removeprefix(BACKBONE), 0)
                own_rate = head_rate if in_head else rate * self.layer_decay**depth
                group = depth if self.unfreeze_ratio else 0, own_rate, self.weight_decay if decayed else 0.0
                groups.setdefault(group, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": params, "lr": lr, "weight_decay": decay} for (_, lr, decay), params in groups.items()],
            lr=rate,
            fused=self.device.type == "cpu",  # 5 times as fast; on CUDA, clipping in fp16 forbids it
        )
        n_steps = remaining_steps(self.trainer)
        if n_steps is None and self.schedule != "constant":
            raise ValueError(
                f"schedule={self.schedule!r} needs to know how long fit lasts: "
                "pass max_steps to the Trainer, or use schedule='constant'"
            )
        if n_steps is None and self.unfreeze_ratio:
            raise ValueError(
                f"unfreeze_ratio={self.unfreeze_ratio} needs to know how long fit lasts: pass max_steps to the Trainer"
            )
        if n_steps is None and self.warmup_ratio > 0:
            rank_zero_warn(f"fit has no end, so warmup_ratio={self.warmup_ratio} is ignored")
        n_warmup = int(self.warmup_ratio * (n_steps or 0))
        factor = partial(
            learning_rate_factor,
            n_warmup=n_warmup,
            n_steps=n_steps,
            schedule=self.schedule,
            final=self.final_ratio,
            n_cooldown=math.ceil(self.cooldown_ratio * (n_steps or 0)),
        )
        pause = self.unfreeze_ratio * (n_steps or 0) / (1 + max(depth_of.values(), default=0))  # until the next joins
        joining: list[Callable[[int], float]] = [
            partial(_from_step, math.ceil((1 + depth) * pause), factor) for depth, _, _ in groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, joining)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, also in bf16 before the fused optimizer.

        Lightning refuses that in any mixed precision. It only matters in fp16, whose gradients a fused optimizer
        unscales in its step; in bf16 nothing is scaled.
        """
        clip = clip_in_bf16(self.trainer) or self.clip_gradients
        clip(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def default_learning_rate(self) -> float:
        """The peak learning rate where none was given."""
        return learning_rate_for(sum(map(_n_weights, self.backbone.parameters())))

    def on_train_start(self) -> None:
        """Resume in the middle of an epoch, although the schedule has set up the loaders before the checkpoint."""
        resume_loaders(self.trainer)

    # --- folders

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the module to a folder of safetensors and JSON, without executable content. Call on every rank.

        The folder contains the transformer in transformers' own layout (``AutoModel.from_pretrained`` reads it, unless
        attention heads were removed from it), the tokenizer, ``head.safetensors`` with all other weights (the head and
        the adapters), and ``evertune.json`` with the settings and the SHA-256 of every file.

        Raises:
            RuntimeError: Before the weights are loaded.
        """
        if self.backbone is None:
            raise RuntimeError(f"{type(self).__name__} has no weights to save yet: call configure_model() first")
        folder = Path(directory)
        # Collective under ZeRO-3 and FSDP2, so before the branch of the writing rank.
        state = whole_state(self)
        if is_writer():
            from safetensors.torch import save_file

            folder.mkdir(parents=True, exist_ok=True)
            names = {name: name_in_transformer(name) for name in state}
            weights = {inner: state[name] for name, inner in names.items() if inner is not None}
            rest = {name: state[name] for name, inner in names.items() if inner is None}
            self.backbone.config.save_pretrained(folder)
            if self.backbone.can_generate():
                self.backbone.generation_config.save_pretrained(folder)
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
            if rest:
                save_file(rest, folder / REST)
            self._save_tokenizer(folder)
            self.save_more(folder)
            settings = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
            settings.pop("model_name_or_path")  # replaced by the folder when it is loaded
            write_manifest(folder, type(self).__name__, settings)
        barrier()

    def save_more(self, folder: Path) -> None:
        """Write further files of a saved module, safetensors or JSON, on the writing rank. By default, none."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, lazy: bool = False, **settings: Any) -> Self:
        """Load a module from a folder that ``save_pretrained`` wrote, with bit-identical weights.

        Args:
            directory: Folder that ``save_pretrained`` wrote.
            lazy: Whether to leave loading the weights to ``configure_model``, so that ZeRO-3 partitions them while
                loading. Default: False.
            settings: Arguments of the constructor that replace the saved ones, as in ``learning_rate=1e-5``.

        Raises:
            FileNotFoundError: If the folder or one of its files is missing.
            ValueError: If a file is damaged, truncated, written by another kind of module, or could run code.
        """
        folder = Path(directory)
        manifest = read_manifest(folder)
        cls._check_kind(folder, manifest)
        module = cls(**{**manifest.hparams, **settings, "model_name_or_path": str(folder)})
        module._saved = folder
        if not lazy:
            module.configure_model()
        return module

    def start_from(self, directory: str | Path) -> None:
        """Use the weights of a folder that ``save_pretrained`` wrote when ``configure_model`` loads the weights.

        The settings and the tokenizer of this module are kept. Call on every rank, before the weights are loaded.

        Raises:
            FileNotFoundError: If the folder or one of its files is missing.
            RuntimeError: If the weights are already loaded.
            ValueError: If a file is damaged, truncated, written by another kind of module, or could run code.
        """
        if self.backbone is not None:
            raise RuntimeError(f"{type(self).__name__} has its weights already: call start_from() before fit")
        folder = Path(directory)
        self._check_kind(folder, read_manifest(folder))
        with suppress(OSError, ValueError):  # the model may have no tokenizer
            self._tokenizer = self.tokenizer
        self.model_name_or_path = str(folder)
        self._saved = folder

    @classmethod
    def _check_kind(cls, folder: Path, manifest: SavedModule) -> None:
        if manifest.module != cls.__name__:
            raise ValueError(f"{folder} holds a {manifest.module}, not a {cls.__name__}")

    def _save_tokenizer(self, folder: Path) -> None:
        try:
            self.tokenizer.save_pretrained(folder)
        except (OSError, ValueError) as error:
            rank_zero_warn(f"no tokenizer is saved: {error}")


def _from_step(first: int, factor: Callable[[int], float], step: int) -> float:
    """The factor of the learning rate at a step; 0 before the first."""
    return factor(step) if step >= first else 0.0


def _n_weights(parameter: nn.Parameter) -> int:
    """The number of elements of a parameter, including one partitioned by ZeRO-3."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _n_dimensions(parameter: nn.Parameter) -> int:
    """The number of dimensions of a parameter, including one partitioned by ZeRO-3 (which is stored flat)."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
