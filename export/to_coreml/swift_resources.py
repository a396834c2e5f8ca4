"""The folder `Resources` as Apple's Swift diffusion runner expects it (apple/ml-stable-diffusion).

Its names (`StableDiffusionPipeline+Resources.swift`): Unet or UnetChunk1 and UnetChunk2,
TextEncoder, TextEncoder2, VAEDecoder, VAEEncoder, vocab.json, merges.txt. And its forms (`Unet`,
`TextEncoder(XL)`, `Decoder.swift`): two timesteps, text states as (B, C, 1, T), token ids as
float32, outputs by its own names. So the programs here are those of the packages with a few
operations in front and other names; weights are shared with them (hard links). The runner loads
compiled models; compiling needs macOS: `compile.sh`.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf.message import Message  # type: ignore[import-untyped]

from laptop import console
from laptop.export.to_coreml.mil_program import read_spec, spec_path
from laptop.models import locating

FOLDER = "Resources"
NAMES = {
    "unet": "Unet",
    "unet_chunk1": "UnetChunk1",
    "unet_chunk2": "UnetChunk2",
    "text_encoder": "TextEncoder",
    "text_encoder_2": "TextEncoder2",
    "vae_decoder": "VAEDecoder",
    "vae_encoder": "VAEEncoder",
}
SCRIPT = """#!/bin/sh
# The runner loads compiled models; this needs macOS with Xcode.
cd "$(dirname "$0")" || exit 1
for package in *.mlpackage; do
    xcrun coremlcompiler compile "$package" . || exit 1
done
"""
Parameters = Mapping[str, str | list[int]]  # of an operation, by name
Step = tuple[str, Mapping[str, list[int]]]  # an operation and its parameters
FLOAT32 = 65568  # ArrayFeatureType.ArrayDataType
FP32, INT32, STRING, BOOL = 11, 23, 2, 1  # MILSpec.DataType


def write(model: str, folder: Path) -> None:
    """Make `Resources` from the packages in `folder` and the tokenizer of `model`.

    Says so and makes none for a U-Net that the runner cannot call.
    """
    why = None
    if locating.unet_config(model).get("time_cond_proj_dim") is not None:
        why = "does not pass the U-Net its guidance (timestep_cond)"
    elif _rows(folder) == 1:
        why = "always guides, with two rows, and this U-Net takes one (guidance is off)"
    if why:
        console.say(
            f"export: {FOLDER} is left out: Apple's Swift runner {why}. The packages are whole."
        )
        return
    out = folder / FOLDER
    out.mkdir()
    is_xl = (folder / "text_encoder_2.mlpackage").exists()
    for component, name in NAMES.items():
        package = folder / f"{component}.mlpackage"
        halves = (folder / "unet_chunk1.mlpackage").exists()
        if package.exists() and not (component == "unet" and halves):
            adapt(package, out / f"{name}.mlpackage", component, is_xl=is_xl)
    for file in ("vocab.json", "merges.txt"):
        source = locating.folder(model) / "tokenizer" / file
        if source.exists():
            shutil.copyfile(source, out / file)
    script = out / "compile.sh"
    script.write_text(SCRIPT)
    script.chmod(0o755)


def _rows(folder: Path) -> int | None:
    """The batch that the U-Net takes; None where there is none."""
    names = (f"{name}.mlpackage" for name in ("unet", "unet_chunk1"))
    for package in (folder / name for name in names if (folder / name).exists()):
        for value in read_spec(package).description.input:
            if value.name == "sample":
                return int(value.type.multiArrayType.shape[0])
    return None


def adapt(package: Path, out: Path, component: str, *, is_xl: bool) -> None:
    """Write `package` in the runner's form to `out`, sharing its weights."""
    shutil.copytree(package, out, copy_function=_link_or_copy)
    spec = read_spec(package)
    inputs = {i.name for i in spec.description.input}
    if component.startswith("unet"):
        _adapt_unet_(spec, inputs)
    elif component.startswith("text_encoder"):
        _ids_as_floats_(spec)
        _keep_outputs_(spec, _text_outputs(spec, component, is_xl=is_xl))
    elif component == "vae_decoder":
        _rename_(spec, {"latent_sample": "z"})
        _keep_outputs_(spec, {"sample": "image"})
    else:
        _rename_(spec, {"sample": "z"})
        _keep_outputs_(spec, {"latent_parameters": "latent"})
    spec_path(out).unlink()
    spec_path(out).write_bytes(spec.SerializeToString())


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _text_outputs(spec: Message, component: str, *, is_xl: bool) -> dict[str, str]:
    """The outputs that the runner reads, with its names for them."""
    names = [o.name for o in spec.description.output]
    pooled = "text_embeds" if "text_embeds" in names else "pooler_output"
    if not is_xl:
        return {"last_hidden_state": "last_hidden_state", pooled: "pooled_outputs"}
    states = sorted(
        (n for n in names if n.startswith("hidden_states_")), key=lambda n: int(n.split("_")[-1])
    )
    return {states[-2]: "hidden_embeds", pooled: "pooled_outputs"}


def _adapt_unet_(spec: Message, inputs: set[str]) -> None:
    if "timestep" in inputs:  # as many as the batch has, all the same
        _in_front_(spec, "timestep", (2,), [("slice_by_size", {"begin": [0], "size": [1]})])
    if "encoder_hidden_states" in inputs:
        batch, tokens, width = _shape(spec, "encoder_hidden_states")
        steps = [("squeeze", {"axes": [2]}), ("transpose", {"perm": [0, 2, 1]})]
        _in_front_(spec, "encoder_hidden_states", (batch, width, 1, tokens), steps)
    if "out_sample" in {o.name for o in spec.description.output}:
        _keep_outputs_(spec, {"out_sample": "noise_pred"})


def _main(spec: Message) -> tuple[Message, Message]:
    """The function `main` of a program and its block."""
    function = spec.mlProgram.functions["main"]
    return function, function.block_specializations[function.opset]


def _shape(spec: Message, name: str) -> tuple[int, ...]:
    (described,) = [i for i in spec.description.input if i.name == name]
    return tuple(described.type.multiArrayType.shape)


def _rename_(spec: Message, names: Mapping[str, str]) -> None:
    """Give values of the program, inputs and outputs among them, other names."""
    function, block = _main(spec)
    for described in (*spec.description.input, *spec.description.output, *function.inputs):
        described.name = names.get(described.name, described.name)
    outputs = [names.get(name, name) for name in block.outputs]
    del block.outputs[:]
    block.outputs.extend(outputs)
    for op in block.operations:
        for argument in op.inputs.values():
            for bound in argument.arguments:
                if bound.WhichOneof("binding") == "name":
                    bound.name = names.get(bound.name, bound.name)
        for output in op.outputs:
            output.name = names.get(output.name, output.name)


def _keep_outputs_(spec: Message, names: Mapping[str, str]) -> None:
    """Drop all outputs but those in `names`, and give these their new names."""
    _, block = _main(spec)
    kept = [o for o in spec.description.output if o.name in names]
    del spec.description.output[:]
    spec.description.output.extend(kept)
    del block.outputs[:]
    block.outputs.extend(o.name for o in kept)
    _rename_(spec, names)


def _in_front_(spec: Message, name: str, shape: tuple[int, ...], steps: Sequence[Step]) -> None:
    """Let the input `name` have `shape`; `steps` make of it what the program takes."""
    inner, described, declared, wanted = _displaced_(spec, name)
    _, block = _main(spec)
    del described.type.multiArrayType.shape[:]
    described.type.multiArrayType.shape.extend(shape)
    _set_shape_(declared.type, shape)
    before, size, operations = name, list(shape), []
    for number, (kind, parameters) in enumerate(steps):
        size = _after(kind, parameters, size)
        after = inner if number == len(steps) - 1 else f"{name}_{kind}"
        operations.append(_operation(block, kind, before, parameters, after, wanted, size))
        before = after
    _prepend_(block, operations)


def _displaced_(spec: Message, name: str) -> tuple[str, Message, Message, Message]:
    """Let the program read `name` under an inner name, for an input of another form.

    Returns the inner name, the input's description and declaration, and the type it had.
    """
    inner = f"{name}_inner"
    _rename_(spec, {name: inner})
    function, _ = _main(spec)
    (described,) = [i for i in spec.description.input if i.name == inner]
    (declared,) = [i for i in function.inputs if i.name == inner]
    wanted = type(declared.type)()
    wanted.CopyFrom(declared.type)
    described.name = declared.name = name
    return inner, described, declared, wanted


def _after(kind: str, parameters: Mapping[str, list[int]], size: list[int]) -> list[int]:
    """The shape of the result of an operation in `steps`."""
    if kind == "squeeze":
        return [n for i, n in enumerate(size) if i not in parameters["axes"]]
    return [size[i] for i in parameters["perm"]] if kind == "transpose" else parameters["size"]


def _ids_as_floats_(spec: Message) -> None:
    """Let the program take token ids in float32, as the runner passes them."""
    name = "input_ids"
    inner, described, declared, wanted = _displaced_(spec, name)
    _, block = _main(spec)
    described.type.multiArrayType.dataType = FLOAT32
    declared.type.tensorType.dataType = FP32
    shape = [int(d.constant.size) for d in wanted.tensorType.dimensions]
    operation = _operation(block, "cast", name, {"dtype": "int32"}, inner, wanted, shape)
    _prepend_(block, [operation])


def _operation(
    block: Message,
    kind: str,
    source: str,
    parameters: Parameters,
    result: str,
    like: Message,
    shape: list[int],
) -> Message:
    """An operation on the value `source`, its parameters as values in place."""
    op = type(block.operations[0])()
    op.type = kind
    op.inputs["x"].arguments.add().name = source
    for name, value in parameters.items():
        _set_value_(op.inputs[name].arguments.add().value, value)
    _set_value_(op.attributes["name"], f"{result}_op")
    output = op.outputs.add()
    output.name = result
    output.type.CopyFrom(like)
    _set_shape_(output.type, shape)
    return op


def _set_shape_(kind: Message, shape: Sequence[int]) -> None:
    kind.tensorType.rank = len(shape)
    del kind.tensorType.dimensions[:]
    for size in shape:
        kind.tensorType.dimensions.add().constant.size = size


def _set_value_(value: Message, content: str | list[int]) -> None:
    """Let a value hold a text or a vector of int32."""
    tensor = value.type.tensorType
    if isinstance(content, str):
        tensor.dataType = STRING
        value.immediateValue.tensor.strings.values.append(content)
        return
    tensor.dataType = INT32
    _set_shape_(value.type, [len(content)])
    value.immediateValue.tensor.ints.values.extend(content)


def _prepend_(block: Message, operations: list[Message]) -> None:
    operations = [*operations, *block.operations]
    del block.operations[:]
    block.operations.extend(operations)
