import nemo_opt._stack

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from nemo_opt.distill.config import DistillationConfig
from nemo_opt.distill.convert import convert_to_distillation_model, export_student
from nemo_opt.distill.losses import cause_of_divergence, distillation_loss_fn
from nemo_opt.errors import ConfigError


def batch(size=8):
    ids = torch.arange(size).expand(2, size)
    return {"tokens": ids, "labels": ids + 1, "loss_mask": torch.ones(2, size), "position_ids": ids, "attention_mask": None}


def run(model):
    data = batch()
    return model(data["tokens"], data["position_ids"], None, labels=data["labels"]), data


def test_teacher_may_be_a_provider(make):
    teacher = make.gpt(make.teacher, 2)
    [model] = convert_to_distillation_model([make.gpt()], (lambda: teacher, (), {}), make.settings)
    assert model.teacher_model is teacher


def test_exported_student_is_an_ordinary_model(make):
    model, plain = make.distillation(), make.gpt()
    output, data = run(model)
    loss, _, _ = distillation_loss_fn(model, data)(output)
    loss.backward()
    [student] = export_student([model])
    assert student is model
    assert type(student) is GPTModel
    # transient: main_grad and such are attributes of parameters, not of modules
    assert vars(student).keys() <= vars(plain).keys()
    assert [name for name, _ in student.named_modules()] == [name for name, _ in plain.named_modules()]
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert torch.equal(run(student)[0], run(plain)[0])
    for (name, module), (_, other) in zip(student.named_modules(), plain.named_modules(), strict=True):
        assert vars(module).keys() == vars(other).keys() or name == ""
        assert not module._forward_hooks


def test_exported_student_can_be_distilled_again(make):
    [student] = export_student(make.distillation())
    [again] = convert_to_distillation_model(student, make.gpt(make.teacher, 2), make.settings)
    output, data = run(again)
    assert distillation_loss_fn(again, data)(output)[2].keys() == {"loss", "kd_loss", "logits_loss", "intermediate_loss"}


def test_own_balancer_may_return_a_number(make):
    class Balancer(type(make.distillation().loss_balancer)):
        def forward(self, losses):
            return 3 * super().forward(losses)["logits_loss"]

    plain, tripled = make.distillation(), make.distillation(settings=DistillationConfig(loss_balancer=Balancer()))
    (output, data), (other, _) = run(plain), run(tripled)
    logits_loss, count = distillation_loss_fn(plain, data)(output)[2]["logits_loss"]
    torch.testing.assert_close(distillation_loss_fn(tripled, data)(other)[2]["loss"], torch.stack([3 * logits_loss, count]))


def test_masked_tokens_do_not_count(make):
    model = make.distillation()
    output, data = run(model)
    data["loss_mask"] = torch.zeros(2, 8)
    loss, count, metrics = distillation_loss_fn(model, data)(output)
    assert (float(loss.detach()), int(count)) == (0, 0)
    assert all(torch.equal(pair, torch.zeros(2)) for pair in metrics.values())
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("roles", [(), ("student",), ("teacher",), ("student", "teacher")])
def test_the_cause_of_a_divergence_is_named(make, roles):
    model = make.distillation()
    for role in roles:
        with torch.no_grad():
            (model if role == "student" else model.teacher_model).output_layer.weight[3, 0] = float("nan")
    assert cause_of_divergence([model]) is None  # nothing has run yet
    output, data = run(model)
    loss, _, _ = distillation_loss_fn(model, data)(output)
    assert torch.isfinite(loss) == (not roles)
    expected = f"the logits of the {' and the '.join(roles)} are not finite" if roles else None
    assert cause_of_divergence([model]) == expected
    assert cause_of_divergence(make.gpt()) is None


def test_loss_of_an_ordinary_model_is_refused(make):
    with pytest.raises(ConfigError, match="not a distillation model"):
        distillation_loss_fn(make.gpt(), batch())
    with pytest.raises(ConfigError, match="no distillation model"):
        export_student(make.gpt())


def test_models_that_do_not_fit_are_refused(make):
    def convert(student, teacher, settings=make.settings):
        return convert_to_distillation_model(student, teacher, settings)

    with pytest.raises(ConfigError, match="120 tokens, of the teacher 100"):
        convert(make.gpt(), make.gpt(make.teacher.with_(vocab_size=100)))
    with pytest.raises(ConfigError, match="logit_kl_topk 121 > vocabulary 120"):
        convert(make.gpt(), make.gpt(make.teacher), DistillationConfig(logit_kl_topk=121))
    with pytest.raises(ConfigError, match=r"not in the student, whose layers are 0\.\.1"):
        convert(make.gpt(), make.gpt(make.teacher), DistillationConfig(intermediate_layer_pairs=[("decoder.layers.2", "decoder.layers.2")]))
    with pytest.raises(ConfigError, match="2 chunks"):
        convert([make.gpt(), make.gpt()], make.gpt(make.teacher))
    with pytest.raises(ConfigError, match="the student is a distillation model already"):
        convert(make.distillation(), make.gpt(make.teacher))
    with pytest.raises(ConfigError, match="the teacher is wrapped"):
        convert(make.gpt(), torch.nn.DataParallel(make.gpt(make.teacher)))
    other_layout = make.gpt(make.teacher)
    other_layout.config.sequence_parallel = True
    with pytest.raises(ConfigError, match="sequence_parallel of the student is False, of the teacher True"):
        convert(make.gpt(), other_layout)
