//! Full fine-tuning: every tensor of the model is trained in its place.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retune_engine::overlay::Overlay;
use retune_engine::spec::ModelSpec;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::method::{Method, MethodInfo, Start};
use crate::targets::BaseModules;
use crate::walk::{tie_head, walk};

/// Full fine-tuning. It has no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Full;

pub static INFO: MethodInfo = MethodInfo {
    name: "full",
    peft_type: None,
    what: "every weight of the model",
    // About a tenth of what an adapter needs.
    learning_rate: 2e-5,
    read: |_| Ok(Arc::new(Full)),
    schema: None,
    from_peft: |path: &Path, _: Map<String, Value>| {
        Err(Error::PeftType { path: path.to_owned(), found: "missing".to_owned() })
    },
};

impl Method for Full {
    fn info(&self) -> &'static MethodInfo {
        &INFO
    }

    fn settings(&self) -> Result<Value, serde_json::Error> {
        Ok(Value::Null)
    }

    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    fn lower(&self, spec: &ModelSpec, _: bool) -> Result<Overlay, Error> {
        let mut overlay = walk(spec, |_, tensor| Some(tensor.to_owned()), |_, _, _| {});
        tie_head(&mut overlay, spec);
        Ok(overlay)
    }

    fn initialise(&self, _: &ModelSpec, _: &Overlay, _: &Start<'_>, _: &mut [f32]) -> Result<(), Error> {
        Ok(())
    }

    fn peft_config(&self, _: &BaseModules<'_>) -> Result<BTreeMap<&'static str, Value>, Error> {
        Ok(BTreeMap::new())
    }
}
