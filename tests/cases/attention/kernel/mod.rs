//! The attention kernels of every dtype against their formula in f64.

mod attention_delta;
mod attention_f32;
mod attention_half;
mod checks;
mod expected;
mod form;
mod inputs;
mod run;
