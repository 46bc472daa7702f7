"""Base models from the hub: the files that are needed, and what stands in the way in one sentence."""

from pathlib import Path

FOLDERS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
UNNEEDED = ("*.ckpt", "*.msgpack", "*.onnx", "*.pb", "*.h5", "*.ot", "*non_ema*")


def download(repo_id: str) -> Path:
    """The local folder of a hub repository in diffusers' layout; pickled weights only where there are no others.

    Raises FileNotFoundError saying what to do.
    """
    folder = _snapshot(repo_id, (*UNNEEDED, "*.bin"))
    if not all(any((folder / part).glob("*.safetensors")) for part in ("vae", "text_encoder", "unet")):
        folder = _snapshot(repo_id, UNNEEDED)
    return folder


def _snapshot(repo_id: str, ignored: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    wanted = ["model_index.json", "README.md", *(f"{name}/*" for name in FOLDERS)]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=wanted, ignore_patterns=list(ignored)))
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo_id} asks for its licence to be accepted: accept it at https://huggingface.co/{repo_id}, log in "
            "with `hf auth login` and run the same command again"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"the hub has no public repository {repo_id}") from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id} is no local folder and the hub cannot be reached: copy a folder in diffusers' layout "
            "(model_index.json, vae, text_encoder, tokenizer, unet, scheduler) here and give its path"
        ) from error
