//! Starts: how the pull that brought a model has spent its time, so that "why was this slow" has an answer after a restart too.

use serde::{Deserialize, Serialize};

use super::io::{names_in, read_small};
use super::record::json_line;
use super::{Error, Volume};
use crate::model::{Effort, ModelId, Timeline};

/// The pull that brought a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartNote {
    /// The version it brought.
    pub model: ModelId,
    /// The id of the pull.
    pub pull: String,
    /// How it has spent its time.
    pub timeline: Timeline,
    /// What it has done.
    pub effort: Effort,
}

impl Volume {
    /// Remembers how a model came. Not durable: it decides nothing, and who waits for the model does not wait for the disk once
    /// more. What a crash tears is not read.
    pub fn remember_start(&self, start: &StartNote) -> Result<(), Error> {
        let path = self.layout.start(start.model);
        let file = self.disk.open_or_create(&path)?;
        self.disk.set_len(&file, &path, 0)?;
        self.disk.write_at(&file, &path, &json_line(start), 0)
    }

    /// How a model came; `None` if that is not known, or cannot be read.
    pub fn start_of(&self, model: ModelId) -> Result<Option<StartNote>, Error> {
        let Some(bytes) = read_small(&self.layout.start(model))? else { return Ok(None) };
        let line = bytes.strip_suffix(b"\n").unwrap_or_default();
        Ok(serde_json::from_slice(line).ok().filter(|start: &StartNote| start.model == model))
    }

    /// Forgets how a model came.
    pub fn forget_start(&self, model: ModelId) -> Result<(), Error> {
        self.disk.unlink(&self.layout.start(model)).map(drop)
    }

    /// Forgets how models came that are not here: a crash may have come between a record and this.
    pub(super) fn sweep_starts(&self, is_here: impl Fn(ModelId) -> bool) -> Result<(), Error> {
        for name in names_in(&self.layout.starts())? {
            // Names that are not ours are left where they are.
            if let Ok(model) = name.parse::<ModelId>()
                && !is_here(model)
            {
                self.forget_start(model)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ModelRef, Stage, StageTime};
    use std::fs;

    fn start(version: &str) -> StartNote {
        let reference: ModelRef = "hf://o/n@main".parse().unwrap();
        let stages = vec![StageTime { stage: Stage::Resolving, took_us: 7 }];
        StartNote {
            model: ModelId::new(&reference, version),
            pull: "p1".into(),
            timeline: Timeline { began_at_ms: 5, stages },
            effort: Effort { fetched_bytes: 9, ..Effort::default() },
        }
    }

    #[test]
    fn how_a_model_came_is_remembered_and_what_is_torn_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let (one, other) = (start("v1"), start("v2"));
        volume.remember_start(&start("v1")).unwrap();
        volume.remember_start(&StartNote { pull: "a longer id than before".into(), ..other.clone() }).unwrap();
        volume.remember_start(&other).unwrap();
        assert_eq!(volume.start_of(one.model).unwrap(), Some(one.clone()));
        assert_eq!(volume.start_of(other.model).unwrap(), Some(other.clone()));

        let path = dir.path().join("starts").join(one.model.to_string());
        let text = fs::read(&path).unwrap();
        for torn in [&text[..text.len() - 1], &text[..9], b"", &[0; 64], &text.repeat(2)] {
            fs::write(&path, torn).unwrap();
            assert_eq!(volume.start_of(one.model).unwrap(), None);
        }
        fs::rename(dir.path().join("starts").join(other.model.to_string()), &path).unwrap();
        assert_eq!(volume.start_of(one.model).unwrap(), None, "it is of another model");
    }

    #[test]
    fn what_is_known_of_models_that_are_gone_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let (here, gone) = (start("v1"), start("v2"));
        for start in [&here, &gone] {
            volume.remember_start(start).unwrap();
        }
        fs::write(dir.path().join("starts/notes.txt"), "x").unwrap();
        volume.sweep_starts(|model| model == here.model).unwrap();
        let names = names_in(&dir.path().join("starts")).unwrap();
        assert_eq!(names, [here.model.to_string(), "notes.txt".to_owned()]);
        volume.forget_start(here.model).unwrap();
        volume.forget_start(here.model).unwrap();
        assert_eq!(volume.start_of(here.model).unwrap(), None);
    }
}
