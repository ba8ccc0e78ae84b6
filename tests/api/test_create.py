"""Making responses with the official client."""

from tests.upstream import answer, script


def test_a_text_answer_comes_back_and_is_retrieved_as_it_was(client):
    made = client.responses.create(model="m", input=script(answer("Hello there")))
    assert made.output_text == "Hello there"
    assert client.responses.retrieve(made.id).to_dict() == made.to_dict()


def test_a_stream_is_the_stored_response(client):
    with client.responses.stream(model="m", input=script(answer("Hello there"))) as stream:
        final = stream.get_final_response()
    assert final.output_text == "Hello there"
    assert client.responses.retrieve(final.id).output_text == "Hello there"
