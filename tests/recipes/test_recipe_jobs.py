"""Every recipe's trainings can be handed to other processes."""

import pickle

import pytest
from joblib import wrap_non_picklable_objects

from recipes.__main__ import main
from recipes.common import grid

GIVEN = {
    "adaptation": [],
    "adversarial": [],
    "corruptions": ["--image-size", "16"],
    "domains": ["--held-out", "0"],
    "fixmatch": [],
    "generate": [],
    "multisite": ["--data", "SITES"],
    "papers": ["--image-size", "16", "--rates", "1e-3"],
    "resolutions": [],
    "segment": [],
    "sensors": [],
    "superclasses": [],
}


class HandedOn(Exception):
    pass


@pytest.mark.parametrize("recipe", GIVEN)
def test_a_training_is_pickled_with_its_data(recipe, sites, tmp_path, monkeypatch):
    def handed_on(folder, wanted, train, jobs):
        assert jobs == 2
        assert callable(pickle.loads(pickle.dumps(wrap_non_picklable_objects(train))))
        raise HandedOn

    monkeypatch.setattr(grid, "run_cells", handed_on)
    given = ["--smoke", "--jobs", "2", "--methods", "bn", "--out", str(tmp_path)]
    with pytest.raises(HandedOn):
        main([recipe, *given, *(str(sites) if w == "SITES" else w for w in GIVEN[recipe])])
