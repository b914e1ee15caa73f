"""Asks the Hugging Face Hub once: its own client repeats requests for half a minute if there is no answer."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

SECONDS = 10.0


def ask_hub(repo_id: str, filename: str, *, revision: str | None = None, token: str | bool | None = None) -> None:
    """Ask for a file's metadata; nothing is fetched. Arguments as for `hf_hub_download`.

    Raises a ConnectionError of one line if there is no answer within ten seconds or requests are switched off
    (`HF_HUB_OFFLINE`), and what the Hub's client raises if the answer is that there is no such file.
    """
    url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS, token=token)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # from the client's HTTP library, which has changed before
        raise ConnectionError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
