"""MVDream as a prior: diffusers' own UNet, told each view's camera, whose views of one object see each other.

MVDream differs from Stable Diffusion 2.1 in two places; `multi_view` gives both to a UNet2DConditionModel:
    emb = time_embed(t) + camera_embed(c2w)    diffusers' class embedding of type "projection"
    attn1: (b f) l c -> b (f l) c              an attention processor; attn2 and the feed-forward stay per view
Published weights carry LDM's names and are renamed while loading. Not here: cameras, guidance, timesteps, training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from psd.errors import RequestError, shown
from psd.models.hub import Source
from psd.models.priors.fit import read_config
from psd.models.priors.ldm import CAMERA_DIM, LDM_CLASS, convert_key, unet_config
from psd.models.priors.stable_diffusion import StableDiffusionPrior, in_dtype, timestep

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LDM_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CHECKPOINT = "unet/sd-v2.1-base-4view.pt"  # of MVDream/MVDream, put beside that config
CHECKPOINT_PREFIX = "model.diffusion_model."


class MVDreamPrior(StableDiffusionPrior):
    """eps-hat of `views` pictures of one object at once, or of single pictures where no camera is given.

    Text encoder, VAE and schedule are Stable Diffusion's; `embed` adds no suffix to a prompt (MVDream's own sampler
    appends ", 3d asset").
    """

    views: int = 4

    def __init__(self, name: str, *parts):
        super().__init__(name, *parts)
        if self.predicts_v:
            raise RequestError(f"'{name}' predicts v: use a multi-view model that predicts epsilon.")

    @classmethod
    def load_unet(cls, name: str, source: Source, dtype: torch.dtype) -> UNet2DConditionModel:
        """The multi-view UNet of a folder or hub repository, frozen, whichever way its unet/ is laid out:

        native     diffusers' UNet2DConditionModel, config and safetensors, in shards or not
        published  config of class MultiViewUNetModel, safetensors with LDM's names; mv_unet.py beside it is never run
        original   that config and MVDream's own sd-v2.1-base-4view.pt, of which only the UNet is read (folders alone)

        Raises RequestError for parameters that do not fit.
        """
        config = read_config(source, "unet/config.json")
        if config["_class_name"] == LDM_CLASS:
            return multi_view(unet_from_ldm(name, config, read_ldm(source), dtype))
        return multi_view(super().load_unet(name, source, dtype))

    def eps(
        self,
        x_t: Float[Tensor, "B C h w"],
        t: int | Int[Tensor, ""] | Int[Tensor, " B"],
        cond: Float[Tensor, "B L D"],
        cameras: Float[Tensor, "B 16"] | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """eps-hat(x_t, cond, t) of groups of `views` rows, ordered (group, view), view fastest.

        Without `cameras` every row is a single picture: nothing is folded and no camera is embedded. Raises ValueError
        where cameras come in incomplete groups.
        """
        views, t = 1 if cameras is None else self.views, timestep(t, x_t.device)

        def unet(part: slice) -> Tensor:
            seen = None if cameras is None else cameras[part].to(self.dtype)
            own_t = t[part] if t.ndim else t
            network = lambda x, y: predict(self.unet, x, own_t, y, seen, views)  # noqa: E731
            return in_dtype(self.dtype, network, x_t[part], cond[part], views=views)

        return self.in_parts(unet, len(x_t), views)


def predict(
    unet: UNet2DConditionModel,
    x_t: Float[Tensor, "B C h w"],
    t: int | Int[Tensor, ""] | Int[Tensor, " B"],
    cond: Float[Tensor, "B L D"],
    cameras: Float[Tensor, "B 16"] | None,
    views: int,
) -> Float[Tensor, "B C h w"]:
    """What a `multi_view` UNet answers, to train it or to use it: every `views` rows are one object.

    A camera of zeros (no camera-to-world matrix is one: its last entry is 1) leaves its row without a camera
    embedding, None does so for every row. Raises ValueError where the rows are not whole groups.
    """
    if len(x_t) % views:
        raise ValueError(f"{len(x_t)} rows are no groups of {views} views")
    if cameras is None:
        cameras = x_t.new_zeros(len(x_t), CAMERA_DIM)
    t, attention = timestep(t, x_t.device), {"views": views}
    return unet(x_t, t, encoder_hidden_states=cond, class_labels=cameras, cross_attention_kwargs=attention).sample


def multi_view(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same UNet, ready for `predict`. Neither change is saved with it; both survive a deepcopy."""
    unet.set_attn_processor(ViewAttention())
    unet.class_embedding.register_forward_hook(drop_absent_cameras)
    return unet


class ViewAttention:
    """softmax(q k^T / sqrt(d)) v of diffusers' Attention; self-attention over the tokens of `views` rows together.

    Keeps no state, the caller passes `views`: threads that share a UNet may differ in it.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Float[Tensor, "B l c"],
        encoder_hidden_states: Float[Tensor, "B L D"] | None = None,
        attention_mask: None = None,
        views: int = 1,
    ) -> Float[Tensor, "B l c"]:
        x = hidden_states
        if encoder_hidden_states is None:
            x = x.unflatten(0, (-1, views)).flatten(1, 2)  # (b f) l c -> b (f l) c
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            x = layer(x)
        return x.reshape(hidden_states.shape)


def drop_absent_cameras(
    module: torch.nn.Module, cameras: tuple[Float[Tensor, "B 16"]], embedding: Float[Tensor, "B E"]
) -> Float[Tensor, "B E"]:
    """Forward hook of the camera embedding: a row of zeros adds nothing, not the embedding of zeros.

    diffusers insists on class_labels, and swapping the layer would be seen by every thread that shares the UNet.
    """
    return embedding * cameras[0].any(dim=-1, keepdim=True)


def start_from(unet2d: UNet2DConditionModel) -> UNet2DConditionModel:
    """A multi-view UNet to train: the weights of a single-view one and a camera embedding that starts at zero.

    Per view (views = 1) it is the same function, whatever the camera. Weights are copied, to float32; the camera
    embedding's first layer is drawn from torch's generator. Raises ValueError for a UNet with a class embedding.
    """
    if unet2d.class_embedding is not None:
        raise ValueError("the UNet has a class embedding: start from a single-view UNet")
    cameras = dict(class_embed_type="projection", projection_class_embeddings_input_dim=CAMERA_DIM)
    config = {name: value for name, value in unet2d.config.items() if name != "_name_or_path"}  # a path of this machine
    unet = type(unet2d).from_config(config, **cameras).to(unet2d.device)
    unet.load_state_dict(unet2d.state_dict() | unet.class_embedding.state_dict(prefix="class_embedding."))
    torch.nn.init.zeros_(unet.class_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.class_embedding.linear_2.bias)
    return multi_view(unet)


def read_ldm(source: Source) -> dict[str, Tensor]:
    """Tensors under LDM's names, mapped from their file: only what is copied out of them takes memory."""
    from safetensors.torch import load_file

    if source.file(CHECKPOINT).exists():
        return torch.load(source.file(CHECKPOINT), map_location="cpu", weights_only=True, mmap=True)
    return load_file(source.file(LDM_WEIGHTS))


def unet_from_ldm(name: str, config: dict, state: dict[str, Tensor], dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen UNet2DConditionModel with exactly the parameters of `state`. Raises RequestError where they do not fit.

    It is built without storage and given each parameter's one copy, in `dtype`.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config(config))
    shapes = {key: parameter.shape for key, parameter in unet.state_dict().items()}
    weights = {convert_key(key, config): weight for key, weight in ldm_unet_state(state).items()}
    lost = [key for key in shapes if key not in weights]
    wrong = [key for key, weight in weights.items() if shapes.get(key) != weight.shape]
    if lost or wrong:
        raise RequestError(
            f"The UNet of '{name}' does not fit MVDream's: {len(lost)} parameters are missing and {len(wrong)} unknown "
            f"or of another shape, the first is {shown([*lost, *wrong][0])}."
        )
    # A copy even where the type stays: the tensors of `state` may be views of a file that can change or vanish.
    unet.load_state_dict({key: weight.to(dtype, copy=True) for key, weight in weights.items()}, assign=True)
    return unet.requires_grad_(False).eval()


def ldm_unet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's part of an original checkpoint, without prefix; a state dict without that prefix as it is."""
    unet = {
        key.removeprefix(CHECKPOINT_PREFIX): weight
        for key, weight in state.items()
        if key.startswith(CHECKPOINT_PREFIX)
    }
    return unet or state
