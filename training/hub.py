"""The Hub: find out early whether it lets us in, and say what happened when it fails."""

from pathlib import Path

from huggingface_hub import HfApi

from admin_hf.card import CARD_NAME, card_by_hand

from .arguments import TranslationTrainingArguments
from .errors import InputError


def check_access(training_args: TranslationTrainingArguments) -> None:
    """Ask the Hub who we are, where `--push_to_hub` is given.

    Raises:
        InputError: it cannot be reached, or does not know the token.
    """
    if training_args.push_to_hub and training_args.process_index == 0:
        try:
            HfApi().whoami(token=training_args.hub_token)
        except Exception as error:  # of the network, of the client, of the Hub
            raise InputError(f"--push_to_hub: the Hub does not let you in: {first_line(error)}") from error


def push_folder(folder: Path, repo_id: str, training_args: TranslationTrainingArguments) -> str:
    """Upload all files of a folder as one commit, and return the address of the repository.

    A card that was written by hand there stays.

    Raises:
        InputError: the upload failed; the folder is unchanged.
    """
    api, token, revision = HfApi(), training_args.hub_token, training_args.hub_revision
    try:
        if revision is not None:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        options = {"token": token, "revision": revision, "commit_message": "Vanilla model, exported by admin-hf"}
        kept = card_by_hand(repo_id, revision, token) and [CARD_NAME]
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=kept, **options)
    except Exception as error:
        raise InputError(
            f"The upload to {repo_id} failed ({first_line(error)}). The model is complete in {folder}, and the same "
            "command tries again."
        ) from error
    return f"{api.endpoint}/{repo_id}"


def first_line(error: Exception) -> str:
    """What the error says; the client adds request numbers and advice in lines below."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
