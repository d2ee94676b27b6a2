//! The keys `method` and `adapter` of a run's configuration: a name of the list of methods, and the settings that this method reads.

use std::borrow::Cow;
use std::ops::Deref;
use std::sync::Arc;

use retune_adapter::{METHODS, Method, MethodInfo, by_name};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserialize, Deserializer, Error as _};
use serde::{Serialize, Serializer};
use serde_json::Value;

/// A method by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MethodName(pub &'static MethodInfo);

impl Default for MethodName {
    /// The first of the list.
    fn default() -> Self {
        Self(METHODS[0])
    }
}

impl Deref for MethodName {
    type Target = MethodInfo;

    fn deref(&self) -> &MethodInfo {
        self.0
    }
}

impl Serialize for MethodName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        by_name(&name).map(Self).ok_or_else(|| {
            let names: Vec<&str> = METHODS.iter().map(|method| method.name).collect();
            D::Error::custom(format!("unknown method {name:?}; expected one of {}", names.join(", ")))
        })
    }
}

impl JsonSchema for MethodName {
    fn schema_name() -> Cow<'static, str> {
        "Method".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let method = |method: &&MethodInfo| {
            let what = format!("{}{}.", method.what[..1].to_uppercase(), &method.what[1..]);
            serde_json::json!({ "type": "string", "const": method.name, "description": what })
        };
        let methods: Vec<Value> = METHODS.iter().map(method).collect();
        json_schema!({ "oneOf": methods, "description": "What is trained." })
    }
}

#[cfg(feature = "clap")]
impl clap::ValueEnum for MethodName {
    fn value_variants<'a>() -> &'a [Self] {
        static NAMES: std::sync::LazyLock<Vec<MethodName>> =
            std::sync::LazyLock::new(|| METHODS.iter().map(|method| MethodName(method)).collect());
        &NAMES
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name).help(self.what))
    }
}

/// A method with its settings, which serialises as these.
#[derive(Clone, Debug)]
pub struct Settings(pub Arc<dyn Method>);

impl Deref for Settings {
    type Target = dyn Method;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for Settings {
    fn eq(&self, other: &Self) -> bool {
        let settings = |of: &Self| of.0.settings().ok();
        self.info() == other.info() && settings(self) == settings(other)
    }
}

impl Serialize for Settings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.settings().map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

/// The schema of the section `adapter`: of one method's settings, or of any method's.
pub(crate) fn settings_schema(method: Option<&MethodInfo>, generator: &mut SchemaGenerator) -> Value {
    let schemas = METHODS.iter().filter(|of| method.is_none_or(|method| method == **of)).filter_map(|of| of.schema);
    let mut branches: Vec<Value> = schemas.map(|schema| schema(generator).to_value()).collect();
    if branches.is_empty() {
        // That a method without settings has none is said in other words.
        branches.push(serde_json::json!({ "type": "object" }));
    }
    branches.push(serde_json::json!({ "type": "null" }));
    Value::Array(branches)
}
