import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt_dist.data.batching import TokenExample, collate, tokenise, tokenise_inputs
from softprompt_dist.data.examples import Example
from softprompt_dist.errors import DataError

WORDS = ["<pad>", "</s>", "<bos>", "a", "b", "c", "d", "yes", "no"]


def word_tokenizer(**special):
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)


def tokens(text, family, limit=8, append_eos=True):
    return tokenise(
        [Example(text, "yes no")],
        word_tokenizer(eos_token="</s>", bos_token="<bos>"),
        family=family,
        max_input_tokens=limit,
        append_eos=append_eos,
    )


def test_seq2seq_inputs_end_in_eos_and_causal_inputs_have_no_special_tokens():
    assert tokens("a b c", "seq2seq").examples == (TokenExample((3, 4, 5, 1), (7, 8, 1)),)
    assert tokens("a b c", "causal").examples == (TokenExample((3, 4, 5), (7, 8, 1)),)
    assert tokens("a", "causal", append_eos=False).examples[0].target_ids == (7, 8)


def test_long_inputs_are_cut_and_counted():
    seq2seq, causal = tokens("a b c d", "seq2seq", limit=3), tokens("a b c d", "causal", limit=3)
    assert seq2seq.examples[0].input_ids == (3, 4, 1)
    assert causal.examples[0].input_ids == (4, 5, 6)
    assert (seq2seq.num_truncated, causal.num_truncated) == (1, 1)
    assert tokens("a b c", "seq2seq", limit=4).num_truncated == 0
    assert tokens("a b c", "causal", limit=3).num_truncated == 0


@pytest.mark.parametrize("family", ["seq2seq", "causal"])
def test_inputs_alone_have_the_tokens_they_have_with_a_target(family):
    texts, tokenizer = ["a b c d", "b"], word_tokenizer(eos_token="</s>")
    alone = tokenise_inputs(texts, tokenizer, family=family, max_input_tokens=3)
    pairs = [tokens(text, family, limit=3) for text in texts]
    assert [e.input_ids for e in alone.examples] == [p.examples[0].input_ids for p in pairs]
    assert [e.target_ids for e in alone.examples] == [(), ()]
    assert alone.num_truncated == 1


def test_one_token_of_room_keeps_a_valid_input():
    assert tokens("a b", "seq2seq", limit=1).examples[0].input_ids == (1,)
    assert tokens("a b", "causal", limit=1).examples[0].input_ids == (4,)


def test_a_tokenizer_without_eos_is_refused_only_where_it_is_needed():
    pair, bare = [Example("a", "yes")], word_tokenizer()
    for family, append_eos in (("seq2seq", False), ("causal", True)):
        with pytest.raises(DataError, match="end-of-sequence"):
            tokenise(pair, bare, family=family, max_input_tokens=4, append_eos=append_eos)
    done = tokenise(pair, bare, family="causal", max_input_tokens=4, append_eos=False)
    assert done.examples == (TokenExample((3,), (7,)),)


def test_no_examples_give_no_tokens():
    done = tokenise([], word_tokenizer(), family="seq2seq", max_input_tokens=4, append_eos=True)
    assert done.examples == ()
    assert done.num_truncated == 0


def test_a_text_without_tokens_is_refused():
    with pytest.raises(DataError, match="no token"):
        tokens(" ", "causal")


PAIRS = [TokenExample((3, 4, 5), (7,)), TokenExample((6,), (8, 1))]


@pytest.mark.parametrize(
    ("family", "second_row", "second_mask"),
    [("seq2seq", [6, 9, 9], [1, 0, 0]), ("causal", [9, 9, 6], [0, 0, 1])],
)
def test_inputs_are_padded_on_the_side_of_the_family(family, second_row, second_mask):
    batch = collate(PAIRS, pad_id=9, family=family)
    assert batch.input_ids_BS.tolist() == [[3, 4, 5], second_row]
    assert batch.input_mask_BS.tolist() == [[1, 1, 1], second_mask]
    assert batch.target_ids_BT.tolist() == [[7, 9], [8, 1]]
    assert batch.target_mask_BT.tolist() == [[1, 0], [1, 1]]
    assert batch.labels_BT.tolist() == [[7, -100], [8, 1]]


def test_a_target_equal_to_the_pad_id_is_still_a_label():
    batch = collate(PAIRS, pad_id=1, family="causal")
    assert batch.labels_BT.tolist() == [[7, -100], [8, 1]]
