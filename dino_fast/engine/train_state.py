"""What learns: student, teacher, loss and optimizer, how they are built, and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dino_fast.engine import compute
from dino_fast.engine import distributed as many
from dino_fast.engine.config import Config
from dino_fast.engine.cuda_graph import StepGraph, graph_for
from dino_fast.engine.distributed import ALONE, Ranks
from dino_fast.engine.optimizers import Optimizer, build_optimizer
from dino_fast.engine.start import start_from
from dino_fast.errors import UserError
from dino_fast.loss import DINOLoss
from dino_fast.models import DINOHead, MultiCropWrapper, VisionTransformer, WeightNormLinear, build_backbone
from dino_fast.optim import AdamWEMA

# The narrow models that `init: xavier` is for start at ln K and stay there with the published deviation of 0.02.
XAVIER_POSITION_STD = 0.3


@dataclass
class Learner:
    """Everything that a step reads and changes."""

    config: Config
    device: torch.device
    autocast: torch.dtype | None  # bfloat16 or float16; None computes in float32
    student: MultiCropWrapper
    teacher: MultiCropWrapper
    loss: DINOLoss  # holds the centre
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    held: Tensor  # boolean scalar on the device: the last step's loss was not finite, so that it changed nothing
    ranks: Ranks = ALONE
    # Calls a function of the student for a forward pass with gradients: DistributedDataParallel must know of it.
    through: Callable[..., Any] = many.directly
    copies: tuple[MultiCropWrapper, MultiCropWrapper] | None = None  # student and teacher in bfloat16
    graph: StepGraph | None = None  # which replays the step on a GPU
    mark: Callable[[str], None] = lambda part: None  # told when a part of the step begins

    @property
    def computing(self) -> tuple[MultiCropWrapper, MultiCropWrapper]:
        """The student and the teacher of the forward pass: themselves, or their bfloat16 copies."""
        return self.copies or (self.student, self.teacher)

    @property
    def cut(self) -> bool:
        """Whether each process holds some of the prototypes."""
        return hasattr(cast(WeightNormLinear, self.teacher.head.last_layer).weight_v, "to_local")

    @property
    def prototypes(self) -> slice:
        """Those whose rows this process holds; all where the last layer is not cut."""
        K = self.config.out_dim
        if not self.cut:
            return slice(0, K)
        rows = -(-K // self.ranks.world)
        return slice(min(K, self.ranks.rank * rows), min(K, self.ranks.rank * rows + rows))


def build_learner(config: Config, channels: int, device: torch.device, precision: str, ranks: Ranks = ALONE) -> Learner:
    """Student, teacher, loss and optimizer of a new run, a function of the configuration and its seed alone."""
    torch.manual_seed(config.seed)
    student = build_model(config, channels, config.drop_path_rate).to(device)
    teacher = build_model(config, channels, 0.0).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    cast(DINOHead, teacher.head).predicts = False
    loss = DINOLoss(
        config.out_dim,
        2 + config.local_crops,
        config.warmup_teacher_temp,
        config.teacher_temp,
        min(config.warmup_teacher_temp_epochs, config.epochs),
        config.epochs,
        config.student_temp,
        config.center_momentum,
    ).to(device)
    if config.init_from is not None:
        start_from(config.init_from, student, teacher, loss, config.init_head)
    autocast = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    half = compute.keeps_half_copies(config, precision, student, ranks.world)
    if not half:
        prepare(config, student, teacher)
    if ranks.world > 1:  # after `prepare`: what is gathered and sent stays outside of what is compiled
        spread(config, student, teacher, device, autocast)
    groups, copies = parameter_groups(student, teacher), None
    if half:
        copies, autocast = (compute.half_copy(student), compute.half_copy(teacher)), None
        for group, of_copies in zip(groups, parameter_groups(*copies), strict=True):
            group |= {"bf16_params": of_copies["params"], "bf16_teacher": of_copies["teacher_params"]}
        prepare(config, *copies)
    if device.type == "cuda":
        compute.use_tf32(config.tf32)
    optimizer = build_optimizer(config.optimizer, groups, config.lr, config.weight_decay, config.clip_grad)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    held = torch.zeros((), dtype=torch.bool, device=device)
    run = Learner(config, device, autocast, student, teacher, loss, optimizer, scaler, held, ranks, copies=copies)
    run.graph = graph_for(run)
    return run


def prepare(config: Config, student: MultiCropWrapper, teacher: MultiCropWrapper) -> None:
    """What the networks of the forward pass keep of their blocks, and whether they are compiled."""
    compute.checkpoint_blocks(student.backbone, config.checkpoint_activations)
    if config.compile:
        for network in (student, teacher):
            compute.compile_blocks(network)


def spread(
    config: Config, student: MultiCropWrapper, teacher: MultiCropWrapper, device: torch.device, dtype: Any
) -> None:
    """Over the processes, as `config.shard` says. Replicas are made where the first step knows what is frozen."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules()):
        if device.type != "cuda":
            raise UserError("batch norm over several processes needs GPUs (PyTorch's SyncBatchNorm); use one process")
        for network in (student, teacher):
            network.backbone, network.head = map(
                nn.SyncBatchNorm.convert_sync_batchnorm, (network.backbone, network.head)
            )
    if config.shard == "none":
        return
    if config.optimizer != "adamw":
        raise UserError(f"--optimizer {config.optimizer} wants whole weights; use --shard none with it, or adamw")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    many.shard(student, mesh, keep=config.shard == "grads", dtype=dtype)
    # Gathered anew for every forward pass: nothing else tells FSDP that the moving average has changed it.
    many.shard(teacher, mesh, keep=False, dtype=dtype)


def build_model(config: Config, channels: int, drop_path_rate: float) -> MultiCropWrapper:
    """Backbone and head as configured."""
    backbone = configured_backbone(config, channels, drop_path_rate)
    head = DINOHead(
        backbone.embed_dim,
        config.out_dim,
        use_bn=config.head_bn,
        norm_last_layer=config.norm_last_layer,
        nlayers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        predictor=config.predictor == "mlp",
    )
    if config.init == "xavier":
        if not isinstance(backbone, VisionTransformer):
            raise UserError(f"--init xavier is for vit_* architectures; use --init published with --arch {config.arch}")
        xavier(backbone, head)
    return MultiCropWrapper(backbone, head)


def configured_backbone(config: Config, channels: int, drop_path_rate: float) -> Any:
    """The backbone: ours, or one of timm or torchvision."""
    sizes = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.heads}
    return build_backbone(
        config.arch,
        patch_size=config.patch_size,
        img_size=config.global_size,
        in_chans=channels,
        drop_path_rate=drop_path_rate,
        **{name: size for name, size in sizes.items() if size is not None},
    )


def xavier(backbone: VisionTransformer, head: nn.Module) -> None:
    """Xavier-uniform linear layers and wide position embeddings; the prototypes keep their own initialisation."""
    for module in (*backbone.modules(), *head.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(backbone.pos_embed, std=XAVIER_POSITION_STD)


def parameter_groups(student: nn.Module, teacher: nn.Module) -> list[dict[str, Any]]:
    """Two groups as published, each with its teacher's parameters: what decays, and biases and vectors."""
    decayed: dict[str, Any] = {"params": [], "teacher_params": []}
    plain: dict[str, Any] = {"params": [], "teacher_params": [], "weight_decay": 0.0}
    for (name, parameter), follower in zip(student.named_parameters(), teacher.parameters(), strict=True):
        if parameter.requires_grad:
            group = plain if name.endswith(".bias") or parameter.ndim == 1 else decayed
            group["params"].append(parameter)
            group["teacher_params"].append(follower)
    return [decayed, plain]


def learner_state(run: Learner) -> dict[str, Any]:
    """What a checkpoint holds of a learner; where it is spread over processes, this one's part (`many.gathered`)."""
    return {
        "student": run.student.state_dict(),
        "teacher": run.teacher.state_dict(),
        "dino_loss": {"center": run.ranks.rows(run.loss.center[0, run.prototypes])[None]}
        if run.cut
        else run.loss.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "torch_rng": torch.get_rng_state(),
    }


def restore_learner(run: Learner, state: dict[str, Any], source: str) -> None:
    """The inverse of `learner_state`, from whole tensors. Raises UserError for a checkpoint of another model."""
    for name, module in (("student", run.student), ("teacher", run.teacher), ("dino_loss", run.loss)):
        try:
            module.load_state_dict(_placed(state[name], module.state_dict()))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint in {source} is of another model than this configuration describes ({error}). "
                "Resume with the settings of that run (leave them out), or start a new run with another --out"
            ) from error
    if run.graph is not None:
        run.graph.forget()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    moments = {
        index: _placed(entries, {name: parameters[index] for name, x in entries.items() if x.ndim})
        for index, entries in state["optimizer"]["state"].items()
    }
    if isinstance(run.optimizer, AdamWEMA):
        run.optimizer.refresh_copies()
    run.optimizer.load_state_dict({**state["optimizer"], "state": moments})
    run.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["torch_rng"])


def _placed(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: many.placed(x, like[name]) if name in like else x for name, x in tensors.items()}
