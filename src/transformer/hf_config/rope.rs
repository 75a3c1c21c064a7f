//! Rotary positions as `config.json` asks for them.

use candle_core::{Result, bail};

use super::fields::{Fields, unsupported};
use crate::layers::RopeScaling;

/// Base of the frequencies, and their scaling.
pub(super) fn read(
    fields: &Fields,
    max_positions: usize,
    head_size: Option<usize>,
) -> Result<(f64, RopeScaling)> {
    // Since version 5, transformers writes theta and scaling together, and reads what it wrote
    // before first.
    let (scaling, parameters) = (fields.object("rope_scaling")?, fields.object("rope_parameters")?);
    let (name, rope) = match scaling.is_empty() {
        false => ("rope_scaling", scaling),
        true => ("rope_parameters", parameters),
    };
    let named = |field: &str| format!("{name}.{field}");
    if let Some(kind) = rope.first_object() {
        return Err(unsupported(&named(kind), "an object", "one kind for all layers"));
    }
    let theta = rope.or("rope_theta", fields.or("rope_theta", 10_000.)?)?;
    let partial = "partial_rotary_factor";
    let outer = fields.get(partial)?.unwrap_or(1.);
    if let Some(other) = [outer, rope.or(partial, outer)?].into_iter().find(|part| *part != 1.) {
        return Err(unsupported(&named(partial), &other.to_string(), "1"));
    }
    let original_max_positions = || {
        let name = "original_max_position_embeddings";
        fields.or(name, rope.or(name, max_positions)?)
    };
    let number = |field: &str| match rope.get(field)? {
        Some(number) => Ok(number),
        None => bail!("config.json: {}: expected a number, got none", named(field)),
    };
    let old_name = rope.or("type", "default".to_string())?;
    let scaling = match rope.or("rope_type", old_name)?.as_str() {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "dynamic" => {
            // Up to `max_position_embeddings`, which no text exceeds here, nothing is stretched; so
            // transformers computes it there.
            let (factor, positions): (f64, _) = (number("factor")?, max_positions as f64);
            let growth = factor * positions / positions - (factor - 1.);
            if head_size == Some(2) {
                let known = "another scaling with head_dim = 2";
                return Err(unsupported(&named("rope_type"), "dynamic", known));
            }
            if (growth - 1.).abs() > 1e-9 {
                let got = factor.to_string();
                return Err(unsupported(
                    &named("factor"),
                    &got,
                    "a factor of some thousands at most",
                ));
            }
            RopeScaling::None
        }
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_positions: original_max_positions()?,
        },
        "yarn" => yarn(&rope, number("factor")?, original_max_positions()?)?,
        other => {
            let known = "default, linear, dynamic, llama3 or yarn";
            return Err(unsupported(&named("rope_type"), other, known));
        }
    };
    Ok((theta, scaling))
}

/// What is absent, or 0 where 0 has no meaning, follows as in transformers.
fn yarn(rope: &Fields, factor: f64, original_max_positions: usize) -> Result<RopeScaling> {
    let or = |field: &str, default: f64| -> Result<f64> {
        Ok(rope.get(field)?.filter(|number| *number != 0.).unwrap_or(default))
    };
    let scale = |times: f64| if factor <= 1. { 1. } else { 0.1 * times * factor.ln() + 1. };
    let (mscale, mscale_all_dim) = (or("mscale", 0.)?, or("mscale_all_dim", 0.)?);
    let usual = match mscale != 0. && mscale_all_dim != 0. {
        true => scale(mscale) / scale(mscale_all_dim),
        false => scale(1.),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: rope.get("attention_factor")?.unwrap_or(usual),
        beta_fast: or("beta_fast", 32.)?,
        beta_slow: or("beta_slow", 1.)?,
        original_max_positions,
        // Null is no.
        truncate: rope.nullable("truncate", Some(true))?.unwrap_or(false),
    })
}
