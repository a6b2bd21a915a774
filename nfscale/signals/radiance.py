"""Radiance fields: rays of posed pictures to colours by volume rendering (Mildenhall et al., "NeRF", ECCV 2020).

A sample is the ray through the centre of a pixel. Its colour is predicted from P points of the field between the
places where the ray enters and leaves the scene's box: one in the middle of each of P equal intervals, or in training
one at a random place in each, which the ray draws anew at every step. The field has no viewing direction: what is
seen looks the same from everywhere.

The box of a scene is the smallest that holds what its training views show: the cells of a cube that (almost) no
view sees through (the visual hull, Laurentini, 1994). Where pictures have no opacity it is the whole cube; where the
cameras' file says how far the scene reaches (COLMAP's points, LLFF's depths), that is its box, wherever it lies, and
rays begin where it says that the scene does. The field's
coordinates span [-1, 1] on each axis of the box, so that a flat or a tall thing uses all of them; against the cube
alone that gains 2 to 3 dB at equal steps. Rays that miss the box are background and are not trained on.

Some views of each scene are held back: its test views, or every `holdout`-th. No step and no check sees them, and
`quality_heldout` is measured on them. `quality`, by which the best weights of a fit are kept, is measured on pixels of
the training views: held-back views that choose the weights would no longer be held back.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from nfscale.signals.base import Apply, Samples, mean_squared_error, psnr_db, require_decodable

FIELD_CHANNELS = 4
"""Of a field: red, green, blue, density, each before its activation."""

_GAIN = 10.0  # outputs of a SIREN are of order 1 or less: a sigmoid of 10 times as much reaches black and white
_DENSITY_SHIFT = -1.0  # fields start as a thin haze of density 0.3, in which every point gets a gradient

_HULL_CELLS = 40  # on an axis of the cube: two pixels of a view of 96, and 64,000 points are carved in a moment
_HULL_VIEWS = 64  # that carve; more of them change little
_HULL_SPARED = 0.05  # of the views may see through a cell: a thin sheet vanishes from views that meet its edge
_COVERED = 0.05  # opacity from which a pixel does not let see through
_OPAQUE = 0.5  # from which it shows something
_OUTSIDE = 0.02  # of the pixels that show something: edges of silhouettes; more means that the cube is too small
_UNLIKE_BACKGROUND = 0.1  # from which difference a pixel without opacity shows something

_SHOWN_VIEWS = 4
_SHOWN_PIXELS = 1 << 19  # of all views that are shown: more would take longer to render than the fit took
_ORTHONORMAL = 1e-2  # how far a rotation may be off: poses are often written with three digits
_BACKGROUNDS = {"white": 1.0, "black": 0.0, "random": 1.0}
"""On which views are shown and measured."""
_GOLDEN = (5**0.5 - 1) / 2

_BOX = tuple(f"box_{part}_{axis}" for part in ("centre", "half") for axis in "xyz")
_CAMERA = ("x", "y", "z", "qw", "qx", "qy", "qz")


@dataclass(frozen=True, eq=False)
class Scene:
    """Pictures of one scene and where their cameras were."""

    images: np.ndarray
    """uint8 [V, H, W, 3], or [V, H, W, 4] with opacity, by which the colours are not multiplied."""
    poses: np.ndarray
    """[V, 4, 4], camera to world: the camera looks down its -z, and its y points up."""
    camera_angle_x: float
    """Horizontal field of view in radians; pixels are square, and the axis meets the middle of the picture."""
    heldout: np.ndarray
    """bool [V]: the test views. Where there are none the signal chooses views to hold back."""
    box: np.ndarray | None = None
    """float64 [6], centre and half sides of what the scene reaches over, where something says so."""
    near: float = 0.0
    """Nothing is nearer to a camera, along its axis."""


@dataclass(frozen=True)
class Radiance:
    """Scenes of any number of views; those of one dataset share batches if their counts and sizes are equal."""

    channels: int = FIELD_CHANNELS
    bound: float = 1.5
    """Half the side of the cube around the origin in which a scene is looked for; 1.5 holds those of NeRF-synthetic."""
    points: int = 16
    """Of the field, on each ray."""
    background: Literal["white", "black", "random"] = "white"
    """Behind the scene, and where a picture is transparent. random: the loss is what it is on average over all colours,
    so that a field cannot paint the background; quality and views are those on white."""
    holdout: int | None = 8
    """Holds back every k-th view of scenes that come without test views; null: none."""
    max_rays: int = 1 << 18
    """Training rays of a scene, spread over its training views; each is 44 bytes."""
    check_rays: int = 2048
    """Pixels of the training views on which quality is measured."""
    heldout_rays: int = 1 << 17
    """Pixels of the held-back views on which quality_heldout is measured: all of them, if they are no more."""

    dimensions = 3
    quality_name = "psnr_db"
    jittered = True
    fixed_shape = False

    def __post_init__(self) -> None:
        if self.channels != FIELD_CHANNELS:
            raise ValueError(
                f"signal.channels={self.channels}: a radiance field has {FIELD_CHANNELS}, red, green, blue and density"
            )
        for name in ("bound", "points", "max_rays", "check_rays", "heldout_rays"):
            if not getattr(self, name) > 0:
                raise ValueError(f"signal.{name} is above 0, got {getattr(self, name)}")
        if self.holdout is not None and self.holdout < 2:
            raise ValueError(f"signal.holdout={self.holdout} would hold back every view; it is at least 2, or null")

    @property
    def points_per_sample(self) -> int:
        return self.points

    @classmethod
    def settled(cls, keys: dict[str, Any], contents: Sequence[Scene]) -> dict[str, Any]:
        """`channels: auto` is what every radiance field has."""
        return keys | {"channels": FIELD_CHANNELS} if keys["channels"] == "auto" else keys

    # --- a scene as samples

    def samples(self, scene: Scene) -> Samples:
        """Training rays, and of whole views the pixels to check and those held back."""
        _refuse_bad(scene)
        training, heldout = self._split(scene)
        box = self._box(scene, training)
        samples = self._training_rays(scene, training, box)
        samples = replace(samples, check=self._whole_views(scene, training, box, self.check_rays))
        if not len(heldout):
            return samples
        return replace(samples, heldout=self._whole_views(scene, heldout, box, self.heldout_rays))

    def _split(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the views to train on and of those held back."""
        views = np.arange(len(scene.images))
        held = scene.heldout.astype(bool)
        if not held.any() and self.holdout is not None and len(views) >= self.holdout:
            held = views % self.holdout == self.holdout // 2
        if held.all():
            raise ValueError("all views of the scene are test views, none is left to train on")
        return views[~held], views[held]

    def _training_rays(self, scene: Scene, training: np.ndarray, box: np.ndarray) -> Samples:
        """Rays that meet the box; their count depends on the counts of views and pixels alone, so that scenes batch."""
        pixels = len(training) * scene.images[0, ..., 0].size
        count = min(self.max_rays, pixels)
        chosen = _spread(pixels, min(pixels, 4 * count))  # about a quarter of the rays of a usual scene meet its box
        rays, values, shows = self._pixels(scene, training, box, chosen)
        meets = rays[:, 7] > rays[:, 6]
        if not meets.any():
            raise ValueError(
                f"no camera sees the cube of signal.bound={self.bound:g} around the origin, where scenes are looked "
                "for; are the poses camera to world, looking down -z?"
            )
        if scene.box is None and (shows & ~meets).sum() > _OUTSIDE * max(shows.sum(), 1):
            raise ValueError(
                f"{(shows & ~meets).sum() / shows.sum():.0%} of what the training views show lies outside the box that "
                f"most of them have in sight up to signal.bound={self.bound:g}; is the scene larger, or is there a "
                "background?"
            )
        inside = np.flatnonzero(meets)
        taken = inside[np.arange(count) * len(inside) // count]  # some twice, where fewer meet the box
        return Samples(torch.from_numpy(rays[taken]), torch.from_numpy(values[taken]))

    def _whole_views(self, scene: Scene, views: np.ndarray, box: np.ndarray, most: int) -> Samples:
        """Pixels spread over all of these views, background included, as the quality of whole pictures has it."""
        pixels = len(views) * scene.images[0, ..., 0].size
        rays, values, _ = self._pixels(scene, views, box, _spread(pixels, min(pixels, most)))
        return Samples(torch.from_numpy(rays), torch.from_numpy(values))

    def _pixels(
        self, scene: Scene, views: np.ndarray, box: np.ndarray, chosen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rays [N, 8], colours [N, 3] and whether something is shown [N], of pixels counted through these views.

        Before a random background colours are [N, 4]: what the scene adds to it, and its opacity.
        """
        height, width = scene.images.shape[1:3]
        view, pixel = views[chosen // (height * width)], chosen % (height * width)
        row, column = pixel // width, pixel % width
        focal = _focal(scene.camera_angle_x, width)
        pixels = scene.images[view, row, column]
        colour, shows = self._composited(pixels)
        if self.background == "random":
            opacity = pixels[..., 3:].astype(np.float32) / 255 if pixels.shape[1] == 4 else np.ones_like(colour[:, :1])
            colour = np.concatenate([colour - (1 - opacity), opacity], axis=1)
        return _rays(scene.poses, view, row, column, (height, width), focal, box, scene.near), colour, shows

    def _composited(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [..., 3 or 4] -> float32 [..., 3] on the background, and whether a pixel shows something."""
        behind = np.float32(_BACKGROUNDS[self.background])
        colour = pixels[..., :3].astype(np.float32) / 255
        if pixels.shape[-1] == 3:
            return colour, np.abs(colour - behind).max(axis=-1) > _UNLIKE_BACKGROUND
        opacity = pixels[..., 3:].astype(np.float32) / 255
        return colour * opacity + behind * (1 - opacity), opacity[..., 0] > _OPAQUE

    def _box(self, scene: Scene, training: np.ndarray) -> np.ndarray:
        """Centre and half sides: float64 [6]."""
        if scene.box is not None:
            return np.asarray(scene.box, dtype=np.float64)
        whole = np.array([0.0, 0.0, 0.0, self.bound, self.bound, self.bound])
        if scene.images.shape[3] == 3:
            return whole
        cells = _visual_hull(scene, training[_spread(len(training), min(len(training), _HULL_VIEWS))], self.bound)
        if not len(cells):
            raise ValueError(
                f"no place up to signal.bound={self.bound:g} from the origin is covered in the training views: either "
                "the scene lies further out, or the poses are not camera to world, looking down -z"
            )
        cell = self.bound / _HULL_CELLS
        low = np.maximum(cells.min(axis=0) - cell, -self.bound)
        high = np.minimum(cells.max(axis=0) + cell, self.bound)
        return np.concatenate([(low + high) / 2, (high - low) / 2])

    # --- rays as colours

    def predict(self, apply: Apply, samples: Samples) -> Tensor:
        origins, directions, near, far = samples.coordinates.split([3, 3, 1, 1], dim=-1)
        step = (far - near) / self.points
        place = 0.5 if samples.jitter is None else samples.jitter.unsqueeze(-1)
        along = near + step * (torch.arange(self.points, device=step.device) + place)  # [F, n, P]
        points = origins.unsqueeze(-2) + along.unsqueeze(-1) * directions.unsqueeze(-2)
        outputs = apply(points.clamp(-1, 1).flatten(1, 2)).unflatten(1, along.shape[1:]) * _GAIN
        depth = softplus(outputs[..., 3] + _DENSITY_SHIFT) * step
        passed = depth.cumsum(dim=-1)
        weights = (depth - passed).exp() - (-passed).exp()
        colour = (weights.unsqueeze(-1) * outputs[..., :3].sigmoid()).sum(dim=-2)
        clear = (-passed[..., -1:]).exp()
        if self.background == "random":
            return torch.cat([colour, 1 - clear], dim=-1)
        return colour + clear * _BACKGROUNDS[self.background]

    def loss(self, predicted: Tensor, samples: Samples) -> Tensor:
        """Mean squared error; before a random background, its mean over backgrounds that are uniform in [0, 1]^3.

        With differences d of a colour and a of opacity and a background b, the mean of (d - a b)^2 over b is
        (d - a / 2)^2 + a^2 / 12.
        """
        if self.background != "random":
            return mean_squared_error(predicted, samples)
        difference = predicted - samples.values
        opacity = difference[..., 3:]
        return ((difference[..., :3] - opacity / 2).square() + opacity.square() / 12).mean(dim=(1, 2))

    def quality(self, predicted: Tensor, samples: Samples) -> Tensor:
        if self.background == "random":
            samples = replace(samples, values=self._on_white(samples.values))
            predicted = self._on_white(predicted)
        return psnr_db(predicted, samples)

    @staticmethod
    def _on_white(values: Tensor) -> Tensor:
        """[..., 4] before a random background -> [..., 3]."""
        return values[..., :3] + 1 - values[..., 3:]

    # --- views of a field

    def measures(self, scene: Scene) -> dict[str, float]:
        """Sizes, the box, and the cameras of the views that are shown: position and unit quaternion."""
        training, heldout = self._split(scene)
        views, (height, width) = len(scene.images), scene.images.shape[1:3]
        shown = self._shown(scene)
        said = {"views": views, "views_heldout": len(heldout), "views_shown": len(shown)}
        said |= {"height": height, "width": width, "camera_angle_x": scene.camera_angle_x}
        said |= dict(zip(_BOX, self._box(scene, training), strict=True))
        said |= {"near": scene.near} if scene.near else {}
        for number, view in enumerate(shown):
            camera = np.concatenate([scene.poses[view][:3, 3], quaternion_of(scene.poses[view][:3, :3])])
            said |= {f"view{number}_{name}": value for name, value in zip(_CAMERA, camera, strict=True)}
        return {name: float(value) for name, value in said.items()}

    def _shown(self, scene: Scene) -> np.ndarray:
        """Views for the eye, spread over those held back; of scenes without, over all."""
        training, heldout = self._split(scene)
        among = heldout if len(heldout) else training
        fitting = max(1, _SHOWN_PIXELS // scene.images[0, ..., 0].size)
        return among[np.arange(0, len(among), -(-len(among) // min(_SHOWN_VIEWS, fitting, len(among))))]

    def shape_of(self, measures: dict[str, float]) -> tuple[Any, ...]:
        """(views, height, width), then as floats the angle of view, the box [6] and each view's camera [7].

        Last, of scenes that begin at a distance from their cameras, that distance.
        """
        views = int(measures["views_shown"])
        numbers = [measures["camera_angle_x"], *(measures[name] for name in _BOX)]
        numbers += [measures[f"view{number}_{name}"] for number in range(views) for name in _CAMERA]
        numbers += [measures["near"]] if "near" in measures else []
        return (views, int(measures["height"]), int(measures["width"]), *numbers)

    def shape_from(self, text: str, fitted: tuple[Any, ...]) -> tuple[Any, ...]:
        """`64x64`: the views that were fitted, at this size. `36x64x64`: so many views around the scene."""
        parts = text.lower().split("x")
        if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(
                f"cannot read {text!r}; write height x width, such as 64x64, or views x height x width of a turn "
                "around the scene, such as 36x64x64"
            )
        *views, height, width = map(int, parts)
        require_decodable((views or fitted[:1])[0] * height * width)
        count = views[0] if views else fitted[0]
        cameras = _turntable(views[0], fitted) if views else fitted[10 : _behind_cameras(fitted)]
        return (count, height, width, *fitted[3:10], *cameras, *fitted[_behind_cameras(fitted) :])

    def coordinates(self, shape: tuple[Any, ...]) -> Tensor:
        """Rays of all pixels, view by view, row by row."""
        views, height, width = shape[:3]
        poses, box = _poses_of(shape), np.array(shape[4:10])
        view, row, column = (index.ravel() for index in np.indices((views, height, width)))
        focal = _focal(shape[3], width)
        near = (*shape[_behind_cameras(shape) :], 0.0)[0]
        return torch.from_numpy(_rays(poses, view, row, column, (height, width), focal, box, near))

    def reconstruct(self, values: Tensor, shape: tuple[Any, ...]) -> np.ndarray:
        """[F, V * H * W, 3] -> [F, V, H, W, 3], clamped to [0, 1]."""
        colours = self._on_white(values) if self.background == "random" else values
        return colours.detach().cpu().clamp(0, 1).reshape(-1, *shape[:3], 3).numpy()

    def original(self, scene: Scene) -> np.ndarray:
        """The views that are shown, on the background: float32 [V, H, W, 3]."""
        return self._composited(scene.images[self._shown(scene)])[0]

    def forward_description(self) -> dict[str, Any]:
        return {
            "kind": "radiance",
            "keys": asdict(self),
            "quality_name": self.quality_name,
            "coordinates": (
                "a world point p is x = (p - box_centre) / box_half on each axis, with the box of the row's metrics. "
                "A ray runs from where it enters the box, or is `near` along the camera's axis, or starts, whichever "
                "comes last, to where it leaves the box; the field is asked at the "
                f"middles of {self.points} equal intervals between"
            ),
            "coordinate_range": [-1.0, 1.0],
            "cameras": (
                "camera to world, in the units of the data, looking down -z, y up. The ray through pixel (i, j) of a "
                "view of H x W is ((j + 0.5 - W / 2) / f, -(i + 0.5 - H / 2) / f, -1), with the focal length "
                "f = W / 2 / tan(camera_angle_x / 2)"
            ),
            "output": {
                "scale": _GAIN,
                "shift": [0.0, 0.0, 0.0, _DENSITY_SHIFT],
                "meaning": (
                    "z = scale * y + shift; colour c = sigmoid(z_rgb) in [0, 1] of full range; density s = "
                    "softplus(z_3) per length of the longest box_half. With d_k = s_k * interval and "
                    "T_k = exp(-(d_1 + ... + d_(k-1))): pixel = sum_k T_k (1 - exp(-d_k)) c_k + "
                    f"exp(-sum_k d_k) * {_BACKGROUNDS[self.background]:g}"
                ),
            },
            "quality": (
                "psnr_db is 10 log10(1 / mean squared error): `quality` over pixels spread over the training views, "
                "`quality_heldout` over pixels spread over the views held back, background included"
            ),
        }


# --- what a scene must be


def _refuse_bad(scene: Scene) -> None:
    if not isinstance(scene, Scene):
        raise ValueError(f"a scene is a `Scene` of pictures and poses, got {type(scene).__name__}")
    images, poses = scene.images, np.asarray(scene.poses)
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape or images.dtype != np.uint8:
        raise ValueError(
            f"pictures of a scene are uint8 [views, height, width, 3 or 4], got {images.dtype} {list(images.shape)}"
        )
    if poses.shape != (len(images), 4, 4) or np.shape(scene.heldout) != (len(images),):
        raise ValueError(f"{len(images)} pictures need as many poses of 4 x 4, got poses {list(poses.shape)}")
    if not 0 < scene.camera_angle_x < np.pi:
        raise ValueError(f"camera_angle_x is an angle between 0 and pi, got {scene.camera_angle_x}")
    if scene.box is not None:
        box = np.asarray(scene.box)
        if box.shape != (6,) or not np.isfinite(box).all() or not (box[3:] > 0).all() or np.abs(box).max() > 1e9:
            raise ValueError("what the scene reaches over is no box: the points or the depths of its cameras say so")
        if not (np.isfinite(scene.near) and scene.near >= 0):
            raise ValueError(f"the scene begins at a distance of {scene.near:g}")
    rotations = poses[:, :3, :3]
    with np.errstate(all="ignore"):
        off = np.abs(rotations @ rotations.swapaxes(1, 2) - np.eye(3)).max(axis=(1, 2))
        proper = np.linalg.det(rotations) > 0
    wrong = ~(np.isfinite(poses).all(axis=(1, 2)) & (off < _ORTHONORMAL) & proper)
    if wrong.any():
        raise ValueError(
            f"the pose of view {int(np.argmax(wrong))} is no rotation and translation of finite numbers; poses are "
            "camera to world, without scale or mirroring"
        )


def _spread(whole: int, count: int) -> np.ndarray:
    """`count` of the numbers below `whole`: one at an irregular place of each run, so that no column is favoured."""
    place = np.arange(count)
    return ((place + place * _GOLDEN % 1) * (whole / count)).astype(np.int64).clip(max=whole - 1)


# --- geometry


def _focal(camera_angle_x: float, width: int) -> float:
    """Focal length in pixels."""
    return width / 2 / float(np.tan(camera_angle_x / 2))


def _rays(
    poses: np.ndarray,
    view: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    size: tuple[int, int],
    focal: float,
    box: np.ndarray,
    begins: float = 0.0,
) -> np.ndarray:
    """Rays of pixels in the coordinates of the box: origin, direction, near, far as float32 [N, 8].

    They begin where they enter the box, but not before this distance along the camera's axis, in the data's unit.
    Lengths along a ray are in units of the box's longest half side. Of a ray that misses the box near and far are 0.
    """
    height, width = size
    local = [(column + 0.5 - width / 2) / focal, (height / 2 - row - 0.5) / focal, np.full(len(view), -1.0)]
    rotations = np.asarray(poses, dtype=np.float64)[:, :3, :3]
    directions = np.einsum("nij,nj->ni", rotations[view], np.stack(local, axis=1))
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)  # of a ray at a distance of 1 along the axis
    directions /= lengths
    centre, half = box[:3], box[3:]
    origins = ((np.asarray(poses, dtype=np.float64)[:, :3, 3] - centre) / half)[view]
    directions *= half.max() / half
    with np.errstate(divide="ignore", invalid="ignore"):
        sides = np.stack([(-1 - origins) / directions, (1 - origins) / directions])
    # A ray within a side of the box and along it gives 0 / 0: it is not bounded by that pair of sides.
    near = np.where(np.isnan(sides), -np.inf, sides).min(axis=0).max(axis=1).clip(min=0)
    far = np.where(np.isnan(sides), np.inf, sides).max(axis=0).min(axis=1)
    near = np.maximum(near, begins * lengths[:, 0] / half.max())
    missed = far <= near
    near[missed] = far[missed] = 0
    return np.concatenate([origins, directions, near[:, None], far[:, None]], axis=1).astype(np.float32)


def _visual_hull(scene: Scene, views: np.ndarray, bound: float) -> np.ndarray:
    """Centres [K, 3] of the cells of the cube that at most `_HULL_SPARED` of the views, or one, see through.

    Those that few views have in sight are left out: between the scene and a camera nothing else would carve them.
    """
    centres = (np.arange(_HULL_CELLS) + 0.5) / _HULL_CELLS * 2 * bound - bound
    cells = np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), axis=-1).reshape(-1, 3)
    height, width = scene.images.shape[1:3]
    focal, radius = _focal(scene.camera_angle_x, width), 3**0.5 * bound / _HULL_CELLS
    seen, clear = np.zeros((2, len(cells)), dtype=np.int64)
    for view in views:
        pose = np.asarray(scene.poses[view], dtype=np.float64)
        local = (cells - pose[:3, 3]) @ pose[:3, :3]
        distance = -local[:, 2]
        ahead = distance > 2 * radius
        away = np.where(ahead, distance, 1.0)
        column = np.floor(focal * local[:, 0] / away + width / 2).astype(np.int64)
        row = np.floor(height / 2 - focal * local[:, 1] / away).astype(np.int64)
        inside = ahead & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        level = np.ceil(np.log2((focal * radius / away).clip(1, max(height, width)))).astype(np.int64)
        through = inside.copy()
        for reach in np.unique(level[inside]):  # a cell covers a square of up to 2^level pixels around its centre's
            covered = _dilated(scene.images[view, ..., 3] > _COVERED * 255, 1 << int(reach))
            of = inside & (level == reach)
            through[of] = ~covered[row[of], column[of]]
        seen, clear = seen + inside, clear + through
        stays = clear <= max(1, int(_HULL_SPARED * len(views)))
        cells, seen, clear = cells[stays], seen[stays], clear[stays]
    return cells[seen > len(views) // 2]


def _dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """Whether anything is set within a square of `reach` pixels around: bool [H, W]."""
    for axis in (0, 1):
        edges = [(reach + 1, reach) if side == axis else (0, 0) for side in (0, 1)]
        total = np.pad(mask, edges).cumsum(axis=axis)
        place = np.arange(mask.shape[axis])
        mask = total.take(place + 2 * reach + 1, axis=axis) > total.take(place, axis=axis)
    return mask


def quaternion_of(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion (w, x, y, z), w >= 0, of a rotation that may be a little off (Bar-Itzhack, 2000)."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = np.asarray(rotation, dtype=np.float64)
    symmetric = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, yx + xy, xz + zx],
            [xz - zx, yx + xy, yy - xx - zz, zy + yz],
            [yx - xy, xz + zx, zy + yz, zz - xx - yy],
        ]
    )
    quaternion = np.linalg.eigh(symmetric)[1][:, -1]
    return quaternion if quaternion[0] >= 0 else -quaternion


def rotation_of(quaternion: np.ndarray) -> np.ndarray:
    """[4] (w, x, y, z) -> [3, 3]."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _behind_cameras(shape: Sequence[float]) -> int:
    """Where the cameras of a shape end."""
    return 10 + int(shape[0]) * len(_CAMERA)


def _poses_of(shape: Sequence[float]) -> np.ndarray:
    """The cameras of a shape: [V, 4, 4]."""
    cameras = np.array(shape[10 : _behind_cameras(shape)], dtype=np.float64).reshape(-1, len(_CAMERA))
    poses = np.tile(np.eye(4), (len(cameras), 1, 1))
    poses[:, :3, 3] = cameras[:, :3]
    poses[:, :3, :3] = [rotation_of(camera[3:]) for camera in cameras]
    return poses


def _turntable(count: int, fitted: Sequence[float]) -> list[float]:
    """Cameras around the box, at the mean distance and height of those that the scene came with: [count * 7]."""
    poses, centre = _poses_of(fitted), np.array(fitted[4:7])
    upwards = poses[:, :3, 1].mean(axis=0)
    axis = int(np.abs(upwards).argmax())  # worlds have one of their axes up
    up = np.eye(3)[axis] * (np.sign(upwards[axis]) or 1.0)
    outwards = poses[:, :3, 3] - centre
    distances = np.linalg.norm(outwards, axis=1)
    elevation = float(np.arcsin((outwards @ up / distances.clip(min=1e-9)).clip(-1, 1)).mean())
    level = np.roll(np.eye(3)[axis], 1)  # another axis
    cameras: list[float] = []
    for turn in 2 * np.pi * np.arange(count) / count:
        flat = np.cos(turn) * level + np.sin(turn) * np.cross(up, level)
        back = np.cos(elevation) * flat + np.sin(elevation) * up
        right = np.cross(up, flat)
        rotation = np.stack([right, np.cross(back, right), back], axis=1)
        cameras += [*(centre + distances.mean() * back), *quaternion_of(rotation)]
    return cameras
