"""Recipes for `--preset`: the demo's and the published ones. A preset lists settings that differ from the defaults."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "data": "demo",
        "mean": (0.286,),
        "std": (0.353,),
        "global_size": 28,
        "local_size": 14,
        "local_crops": 2,
        "local_scale": (0.15, 0.5),
        "jitter": (0.4, 0.4, 0.0, 0.0),  # the images are gray
        "gray_p": 0.0,
        "blur_p": (0.0, 0.0, 0.0),  # up to 2 pixels, which is much at this size
        "solarize_p": (0.0, 0.0, 0.0),
        "arch": "vit_tiny",
        "patch_size": 7,
        "embed_dim": 64,
        "depth": 3,
        "num_heads": 1,
        "drop_path_rate": 0.0,
        "init": "xavier",
        "out_dim": 512,
        "head_hidden_dim": 256,
        "head_bottleneck_dim": 64,
        "teacher_temp": 0.03,
        "warmup_teacher_temp": 0.03,
        "center_init": "first_batch",
        "batch_size": 32,
        "epochs": 32,  # 5,000 steps; docs/demo.md has the runs that led here
        "lr": 0.016,  # 0.002 at 32 images
        "min_lr": 4e-5,
        "warmup_epochs": 0.64,  # 100 steps
        "weight_decay_end": 0.04,
        "momentum_teacher": 0.985,
        "freeze_last_layer": 0.32,  # 50 steps
        "knn_every": 4.0,
    },
    # The "vanilla" run of the original's README: its defaults, on 8 GPUs with 64 images each (k-NN 69.3, linear 74.0).
    "vit_small_100ep": {"arch": "vit_small", "epochs": 100, "batch_size": 512},
    # The same with the blur of the successors' code, which draws the complement of the published probabilities.
    "vit_small_inverted_blur": {"arch": "vit_small", "epochs": 100, "batch_size": 512, "blur_p": (0.0, 0.9, 0.5)},
    # "Boosting DINO performance" there: the same on 16 GPUs with these changes (k-NN 73.3, linear 76.0).
    "vit_small_boost": {
        "arch": "vit_small",
        "epochs": 300,
        "batch_size": 1024,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
    },
    # The README's command for a ResNet-50, 8 GPUs with 64 images each. The figures beside it there (k-NN 67.5, linear
    # 75.3) are of released weights of another recipe, batch 4080 (dino#133, #145).
    "resnet50": {
        "arch": "torchvision/resnet50",
        "batch_size": 512,
        "optimizer": "sgd",
        "lr": 0.03,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "global_scale": (0.14, 1.0),
        "local_scale": (0.05, 0.14),
    },
    # The released ViT-B/16 (k-NN 76.1, linear 78.2): dino_vitbase16_pretrain/args.txt, which the README links to; 32
    # GPUs with 32 images each, without fp16 (--precision is as elsewhere). What is not here has the default there too.
    "vit_base": {
        "arch": "vit_base",
        "epochs": 400,
        "batch_size": 1024,
        "lr": 0.00075,
        "min_lr": 2e-6,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "freeze_last_layer": 3.0,
        "clip_grad": 0.3,
        "local_crops": 10,
        "global_scale": (0.25, 1.0),
        "local_scale": (0.05, 0.25),
    },
}
