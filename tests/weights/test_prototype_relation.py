"""Prototypes and their relations to samples: what the certificate does not look at."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vestige
from tests.weights.common import arguments, blobs, learn, stream, vit
from vestige.errors import InputError, UnsupportedModelError
from vestige.weights.retain import ContinualTrainer, Stream
from vestige.weights.retain.learner import Learner
from vestige.weights.retain.prototype_relation import contrast, relation_gap


def prd(**options):
    return vestige.method("prototype-relation", **{"views": 1, **options})


@pytest.mark.parametrize("options", [{"over": "prototypes"}, {"projection": 0}, {"relations": 0.0, "views": 2}])
def test_every_form_agrees_with_its_reference(options):
    from vestige.evidence.certify.weights_retain import LearnerCase, weights_are_the_references

    weights_are_the_references(LearnerCase(method=prd(**options)))


def test_contrast_needs_a_pair_and_is_low_where_classes_are_apart():
    z = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.1], [-1.0, 0.0]]), dim=-1)
    apart, mixed = (contrast(z, torch.tensor(y), 0.1) for y in ([0, 0, 1, 1], [0, 1, 0, 1]))
    assert apart < 1e-3 and mixed > 5
    # A row without its like among others is left out, and does not count as a pair.
    assert contrast(z, torch.tensor([0, 0, 1, 2]), 0.1) < 1e-3
    alone = z.clone().requires_grad_()
    lone = contrast(alone, torch.arange(4), 0.1)
    lone.backward()
    assert lone == 0 and not alone.grad.any()


def test_relations_are_of_samples_or_of_prototypes():
    then = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    groups = [[0, 1], [2, 3]]
    shifted = then + torch.arange(4.0)  # each prototype nearer to all samples alike
    assert relation_gap(shifted, then, 1.0, groups, "samples") == pytest.approx(0, abs=1e-6)
    assert relation_gap(shifted, then, 1.0, groups, "prototypes") > 0.01
    lifted = then + torch.arange(6.0)[:, None]  # each sample nearer to all prototypes alike
    assert relation_gap(lifted, then, 1.0, groups, "prototypes") == pytest.approx(0, abs=1e-6)
    assert relation_gap(lifted, then, 1.0, groups, "samples") > 0.01


def test_prototypes_do_not_move_the_features():
    args = {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    models = [learn(prd(prototypes=w, relations=0), args=arguments(**args))[1] for w in (0.5, 8.0)]
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other) == (name != "classifier.weight"), name


def test_the_output_layer_answers_as_the_nearest_prototype_did():
    run, model = learn(prd(), args=arguments(num_train_epochs=20))
    assert torch.allclose(model.classifier.weight.norm(dim=-1), torch.ones(6))
    assert not model.classifier.bias.any() and model.classifier.bias.requires_grad
    images, labels = blobs(30, seed=1).tensors
    with torch.no_grad():
        right = (model.eval()(pixel_values=images).logits.argmax(-1) == labels).float()
    for column, classes in enumerate(((0, 1), (2, 3), (4, 5))):
        mine = torch.isin(labels, torch.tensor(classes))
        assert run.matrix[-1, column] == pytest.approx(float(right[mine].mean()))
    assert run.matrix[0, 0] > 0.9 and run.matrix[0, 1] == 0  # what was not seen yet is no answer


def test_old_prototypes_move_along_only_with_relations():
    first = learn(prd(), on=Stream(stream().experiences[:1], "class"))[1].classifier.weight[:2]
    both = Stream(stream().experiences[:2], "class")
    free, held = (learn(prd(relations=w), on=both)[1].classifier.weight[:2] for w in (0.0, 4.0))
    assert torch.allclose(F.normalize(free, dim=-1), first, atol=1e-6)
    assert (held - first).abs().max() > 1e-4


def test_a_second_view_is_read_from_the_data_again():
    class Shaken(torch.utils.data.Dataset):
        """Rows that are another each time they are read."""

        def __init__(self):
            self.rows, self.read = blobs(), []

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, n):
            self.read.append(n)
            image, label = self.rows[n]
            return {"pixel_values": image + 0.1 * torch.randn(image.shape), "labels": int(label)}

    counts = []
    for views in (1, 2):
        data = Shaken()
        on = Stream.by_class(data, blobs(30, seed=1), experiences=[[0, 1]])
        data.read.clear()
        learn(prd(views=views), on=on, args=arguments(num_train_epochs=1))
        counts.append(len(data.read))
    assert counts == [1 + 16, 1 + 32]  # one row is looked at before any work


def test_tasks_blurred_streams_and_sums():
    assert learn(prd(), on=stream(kind="task"), args=arguments(num_train_epochs=20))[0].average > 0.6
    assert learn(prd(), on=stream(blur=0.3, seed=0))[0].matrix.shape == (3, 3)
    run, _ = learn(prd() + Learner.from_spec({"name": "rehearsal-free", "head": "softmax", "prediction": 0, "l2": 0.1}))
    assert run.state_bytes > 0


def test_the_former_model_is_counted_without_the_projection():
    trainer = ContinualTrainer(vit(), prd(), arguments())
    run = trainer.run(stream())
    assert run.state_bytes == sum(p.nbytes for p in vit().parameters()) - vit().classifier.bias.nbytes


def test_what_it_cannot_do_is_refused():
    with pytest.raises(InputError, match="needs the classes"):
        learn(prd(), on=Stream.of([(blobs(), blobs())]))
    model = vit()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 6))
    with pytest.raises(UnsupportedModelError, match="a Sequential"):
        learn(prd(), model)
    model = vit()
    model.classifier.weight.requires_grad_(False)
    before = model.classifier.weight.clone()
    with pytest.raises(UnsupportedModelError, match="not trained"):
        learn(prd(), model)
    assert torch.equal(model.classifier.weight, before)
