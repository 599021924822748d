"""The final checkpoint on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from prune_opd.errors import HubError
from prune_opd.training.checkpoint import MANIFEST, RANDOM, STATE

TRAINING_STATE = [
    "optimizer-*.safetensors",
    RANDOM,
    STATE,
    MANIFEST,
]  # of a checkpoint; nobody who loads the model needs it


def check_repo(repo: str) -> None:
    """Make sure that `repo` can be pushed to before hours are spent: it is created, private, unless it exists.

    Raises HubError: no name of a repository, nobody is logged in, or the Hub refuses.
    """
    try:
        validate_repo_id(repo)
        api = HfApi()
        api.whoami()
        api.create_repo(repo, private=True, exist_ok=True)
    except HFValidationError as error:
        raise HubError(f"--push-to-hub {repo!r} is no name of a repository: {error}; give OWNER/NAME") from None
    except LocalTokenNotFoundError:
        raise HubError("--push-to-hub needs someone who is logged in; run `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"--push-to-hub {repo}: the Hub refused or cannot be reached ({error}); nothing was trained"
        ) from None


def push(checkpoint: Path, repo: str) -> str:
    """Upload a checkpoint with its card, without the training state, and return its address. Raises HubError."""
    try:
        HfApi().upload_folder(
            repo_id=repo, folder_path=checkpoint, ignore_patterns=TRAINING_STATE, commit_message="Upload by prune-opd"
        )
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"{checkpoint} could not be uploaded to {repo} ({error}); it is whole on disk: "
            f"`hf upload {repo} {checkpoint} --exclude {' '.join(TRAINING_STATE)}`"
        ) from error
    return f"{HfApi().endpoint}/{repo}"
