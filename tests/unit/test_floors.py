from softprompt_dist.data.examples import Example
from softprompt_dist.data.floors import majority_class, naive_bayes
from softprompt_dist.data.tasks import TaskData
from softprompt_dist.run.judgement import FLOORS, floor_predictions


def task_of(*pairs):
    train = tuple(Example(text, target) for text, target in pairs)
    return TaskData("t", {"train": train}, ("bad", "good"), ("accuracy",), "own: bad, good", {})


TRAIN = [("dull dull film", "bad"), ("lovely film", "good"), ("lovely warm story", "good")]
ASKED = [Example("so dull", "bad"), Example("warm and lovely", "good"), Example("unseen", "bad")]


def test_majority_class_is_that_of_train():
    assert majority_class(task_of(*TRAIN), ASKED) == ["good"] * 3


def test_a_tie_goes_to_the_earlier_label():
    assert majority_class(task_of(*TRAIN[1::-1]), ASKED[:1]) == ["bad"]


def test_free_text_has_a_most_frequent_target_too():
    train = tuple(Example("q", target) for target in ("1831", "Bern", "Bern"))
    task = TaskData("t", {"train": train}, (), ("squad",), "own: free text", {})
    assert majority_class(task, ASKED[:2]) == ["Bern", "Bern"]


def test_naive_bayes_learns_words_and_falls_back_to_the_prior():
    assert naive_bayes(task_of(*TRAIN), ASKED) == ["bad", "good", "good"]


def test_naive_bayes_without_any_word_is_the_majority_class():
    assert naive_bayes(task_of(("a", "good"), ("?", "good"), ("!", "bad")), ASKED) == ["good"] * 3


def test_no_examples_no_predictions():
    assert naive_bayes(task_of(*TRAIN), []) == []


def test_always_naming_one_referent_is_the_floor_of_wsc():
    train = tuple(Example("q", name, facts={"label": 1}) for name in ("Ann", "the dog", "Ann"))
    task = TaskData("t", {"train": train}, (), ("wsc",), "coreference", {})
    assert floor_predictions(task, ASKED[:2]) == {"majority class": ["Ann", "Ann"]}


def test_free_text_without_a_rule_has_no_floor():
    task = TaskData("t", {"train": TRAIN}, (), ("squad",), "span", {})
    assert floor_predictions(task, ASKED) == {}


def test_labels_have_both_floors_where_there_is_train():
    assert list(floor_predictions(task_of(*TRAIN), ASKED)) == list(FLOORS)
    without = TaskData("t", {}, ("bad", "good"), ("accuracy",), "own: bad, good", {})
    assert floor_predictions(without, ASKED) == {}
