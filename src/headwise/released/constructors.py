"""The constructors of the released code: its arguments, and our models of these sizes."""

from collections.abc import Sequence

from torch import nn

from headwise.models import DiT, DiTConfig, TransNeXtConfig, TransNeXtForImageClassification


def dit(
    *,
    input_size: int = 32,
    patch_size: int = 2,
    in_channels: int = 4,
    hidden_size: int = 1152,
    depth: int = 28,
    num_heads: int | list[int] = 16,
    mlp_ratio: float = 4.0,
    class_dropout_prob: float = 0.1,
    num_classes: int = 1000,
    learn_sigma: bool = True,
    moh: bool = False,
    shared_head: Sequence[int] = (),
    routed_head: Sequence[int] = (),
    head_dim: int | None = None,
) -> nn.Module:
    """MoH-DiT, and DiT itself, which has no heads to route."""
    active = [shared + kept for shared, kept in zip(shared_head, routed_head, strict=False)]
    config = DiTConfig(
        input_size=input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_heads=num_heads,
        # The released code ignores it where all layers have as many heads.
        head_dim=None if isinstance(num_heads, int) else head_dim,
        mlp_ratio=mlp_ratio,
        class_dropout=class_dropout_prob,
        num_labels=num_classes,
        learn_sigma=learn_sigma,
        shared_heads=list(shared_head) if moh else None,
        active_heads=active if moh else None,
    )
    return DiT(config)


def transnext(
    *,
    patch_size: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    img_size: int = 224,
    pretrain_size: int | None = None,
    window_size: Sequence[int | None] = (3, 3, 3, None),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    in_chans: int = 3,
    num_classes: int = 1000,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    shared_head: Sequence[int] | None = None,
    routed_head: Sequence[int] | None = None,
) -> nn.Module:
    """MoH-ViT, and TransNeXt itself, which has no heads to route."""
    # Global attention has no window.
    windows = {w for w, ratio in zip(window_size, sr_ratios, strict=False) if ratio > 1}
    if len(windows) > 1:
        raise ValueError(f"window_size is {list(window_size)}; all windows must be of one size")
    active = routed_head
    if shared_head is not None and routed_head is not None:
        active = [shared + kept for shared, kept in zip(shared_head, routed_head, strict=False)]
    config = TransNeXtConfig(
        image_size=img_size,
        pretrain_size=pretrain_size,
        patch_size=patch_size,
        num_channels=in_chans,
        hidden_sizes=tuple(embed_dims),
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        mlp_ratios=tuple(mlp_ratios),
        sr_ratios=tuple(sr_ratios),
        window_size=windows.pop() if windows else 3,
        hidden_dropout=drop_rate,
        drop_path_rate=drop_path_rate,
        shared_heads=shared_head,
        active_heads=active,
        num_labels=num_classes,
    )
    return TransNeXtForImageClassification(config)
