import torch

from softprompt_dist.errors import CheckpointError
from softprompt_dist.parallel import ranks
from softprompt_dist.run.checkpoint import CheckpointStore


def tensors_at(step):
    return {"prompt": torch.full((3, 4), float(step))}


def save_two(folder):
    store = CheckpointStore(folder, keep_last=2)
    torch.manual_seed(ranks.rank())
    following = []
    for step in (20, 40):
        torch.rand(7)
        store.save(step, tensors_at(step), {"seed": 1, "cursor": step * 32})
        following.append(torch.get_rng_state()[:64].tolist())
    return following


def load(folder):
    try:
        checkpoint = CheckpointStore(folder, keep_last=2).load_newest()
    except CheckpointError as error:
        return {"error": str(error)}
    checkpoint.restore_rng()
    return {
        "step": checkpoint.step,
        "state": checkpoint.state,
        "prompt": checkpoint.tensors["prompt"].tolist(),
        "rng": torch.get_rng_state()[:64].tolist(),
        "draw": torch.rand(2).tolist(),
    }


def save_into_a_file(path):
    try:
        CheckpointStore(path, keep_last=1).save(1, tensors_at(1), {})
    except CheckpointError as error:
        return str(error)
    return None


def damage(folder, step):
    path = folder / f"step-{step:08d}" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_both_ranks_fall_back_to_the_same_checkpoint_and_then_to_an_error(run_on_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    saved = run_on_ranks(save_two, 2, folder=folder)
    damage(folder, 40)
    first, second = run_on_ranks(load, 2, folder=folder)
    assert first["step"] == second["step"] == 20
    assert first["state"] == second["state"] == {"seed": 1, "cursor": 640}
    assert first["prompt"] == second["prompt"] == tensors_at(20)["prompt"].tolist()
    assert [first["rng"], second["rng"]] == [saved[0][0], saved[1][0]]
    assert first["draw"] != second["draw"]

    damage(folder, 20)
    first, second = run_on_ranks(load, 2, folder=folder)
    assert first == second
    assert "--fresh" in first["error"]


def test_a_run_of_two_ranks_resumes_on_one(run_on_ranks, tmp_path):
    folder = tmp_path / "checkpoints"
    run_on_ranks(save_two, 2, folder=folder)
    once = run_on_ranks(load, 1, folder=folder)
    assert once[0]["step"] == 40
    assert once[0]["prompt"] == tensors_at(40)["prompt"].tolist()


def test_a_failed_save_is_an_error_on_all_ranks(run_on_ranks, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    first, second = run_on_ranks(save_into_a_file, 2, path=path)
    assert first == second
    assert "could not be written" in first
