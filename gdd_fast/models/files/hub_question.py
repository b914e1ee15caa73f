"""Whether the Hugging Face Hub answers, asked once: its client by itself asks again and again for half a minute."""

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

SECONDS = 10.0


def ask_hub(repo_id: str, filename: str, *, revision: str | None = None, token: str | bool | None = None) -> None:
    """Ask for a file's description; nothing is fetched. Arguments mean what they mean in `hf_hub_download`.

    Raises ConnectionError, with one line, if no answer comes within ten seconds or questions are switched off
    (`HF_HUB_OFFLINE`), and what the Hub's client raises if it answers that there is no such file.
    """
    url = huggingface_hub.hf_hub_url(repo_id, filename, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS, token=token)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # of whatever library the client sends its requests with; it has changed
        raise ConnectionError((str(error).strip() or type(error).__name__).splitlines()[0]) from error
