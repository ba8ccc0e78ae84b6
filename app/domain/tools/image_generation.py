"""`image_generation`."""

from msgspec import UNSET
from msgspec.structs import replace

from app.domain.hosted import HostedRoute
from app.domain.tools.answers import Answer
from app.domain.tools.server_tool import Hosted, function
from app.ids import NewId
from app.wire.decoding import Json
from app.wire.items import ImageGenerationCall


class ImageGeneration(Hosted[ImageGenerationCall]):
    kind = "image_generation"
    types = ("image_generation",)
    function = function(
        "image_generation",
        "Make an image from a description.",
        prompt={"type": "string", "description": "What the image shows."},
    )
    item_type = "image_generation_call"
    id_prefix = "ig"
    stages = ("in_progress", "generating")

    def item(self, new_id: NewId, given: Json, arguments: str, container: str) -> ImageGenerationCall:
        return ImageGenerationCall(
            id=new_id(self.id_prefix), status="in_progress", revised_prompt=str(given.get("prompt", ""))
        )

    def done(self, item: ImageGenerationCall, answer: Answer, route: HostedRoute | None) -> ImageGenerationCall:
        result = answer.images[0][1] if answer.images else None
        if answer.error is None and result is not None:
            return replace(item, result=result, error=UNSET, status="completed")
        error = {"type": "image_generation_error", "message": answer.error_message}
        return replace(item, result=result, error=error, status="failed")

    def given(self, item: ImageGenerationCall) -> Json:
        return {"prompt": item.revised_prompt or ""}

    def result(self, item: ImageGenerationCall) -> str:
        return "The image was made and shown to the user." if item.result else "Error: no image was made."
