//! A JSON object, read field by field so that an error can name the field.

use candle_core::{Error, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub(super) struct Fields(Map<String, Value>);

impl Fields {
    pub(super) fn new(json: &str) -> Result<Self> {
        match serde_json::from_str(json) {
            Ok(fields) => Ok(Self(fields)),
            Err(error) => bail!("config.json: expected a JSON object: {error}"),
        }
    }

    /// The object that is the value of a field; empty if it is absent or null.
    pub(super) fn object(&self, name: &str) -> Result<Self> {
        Ok(Self(self.get(name)?.unwrap_or_default()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a field that is there and not null.
    pub(super) fn set(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A field whose value is an object.
    pub(super) fn first_object(&self) -> Option<&str> {
        self.0.iter().find(|(_, value)| value.is_object()).map(|(name, _)| name.as_str())
    }

    /// The value of a field; `None` if it is absent or null.
    pub(super) fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let value = self.0.get(name).cloned().unwrap_or(Value::Null);
        match serde_json::from_value(value) {
            Ok(value) => Ok(value),
            Err(error) => bail!("config.json: {name}: {error}: correct the file"),
        }
    }

    /// The value of a field for which null means something; the default is that of an absent one.
    pub(super) fn nullable<T: DeserializeOwned>(
        &self,
        name: &str,
        default: Option<T>,
    ) -> Result<Option<T>> {
        if self.0.contains_key(name) { self.get(name) } else { Ok(default) }
    }

    /// The value of a field that may be absent, but not null.
    pub(super) fn or<T: DeserializeOwned>(&self, name: &str, default: T) -> Result<T> {
        match self.nullable(name, Some(default))? {
            Some(value) => Ok(value),
            None => bail!("config.json: {name}: expected a value, got null: leave the field out"),
        }
    }

    /// A positive number, written as one with a fraction or exponent, which transformers asks for.
    pub(super) fn positive(&self, name: &str, default: f64) -> Result<f64> {
        let number = self.or(name, default)?;
        let is_whole = self.0.get(name).is_some_and(|value| value.is_u64() || value.is_i64());
        if is_whole || !(number.is_finite() && number > 0.) {
            bail!(
                "config.json: {name}: expected a positive number with a fraction or exponent, got \
                 {number}: correct the file"
            )
        }
        Ok(number)
    }

    pub(super) fn probability(&self, name: &str, default: f32) -> Result<f32> {
        let rate = self.or(name, default)?;
        if !(0.0..=1.0).contains(&rate) {
            bail!(
                "config.json: {name}: expected a probability from 0 to 1, got {rate}: correct the file"
            )
        }
        Ok(rate)
    }

    /// Refuses all but one value of a flag.
    pub(super) fn expect(&self, name: &str, usual: bool) -> Result<()> {
        if self.or(name, usual)? != usual {
            return Err(unsupported(name, &(!usual).to_string(), &usual.to_string()));
        }
        Ok(())
    }

    /// How many layers before the first with a window have none, if `layer_types` says so.
    pub(super) fn layers_before_windows(&self, layers: usize) -> Result<Option<usize>> {
        let name = "layer_types";
        let Some(types) = self.get::<Vec<String>>(name)? else { return Ok(None) };
        if types.len() != layers {
            bail!(
                "config.json: {name}: expected one for each of num_hidden_layers = {layers}, got {}: \
                 correct the file",
                types.len()
            )
        }
        let before = types.iter().take_while(|kind| *kind == "full_attention").count();
        match types[before..].iter().find(|kind| *kind != "sliding_attention") {
            None => Ok(Some(before)),
            Some(other) => {
                let known = "full_attention, and sliding_attention from some layer to the last";
                Err(unsupported(name, other, known))
            }
        }
    }

    /// Refuses windows, in a model whose every layer sees all tokens.
    pub(super) fn expect_full_attention(&self, layers: usize) -> Result<()> {
        if let Some(window) = self.set("sliding_window") {
            return Err(unsupported("sliding_window", &window.to_string(), "none"));
        }
        match self.layers_before_windows(layers)? {
            Some(before) if before != layers => {
                Err(unsupported("layer_types", "sliding_attention", "full_attention"))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn unsupported(field: &str, got: &str, known: &str) -> Error {
    let message =
        format!("config.json: {field}: expected {known}, got {got:?}: this model has no other");
    Error::Msg(message).bt()
}
