//! What passes on the CPU are made of: elements and the reals they are computed in, loops that vectorise,
//! sums over rows, outputs that are filled in parallel, products of tiles and of whole matrices.

mod column_sums;
mod element;
mod filled;
mod half;
mod lanes;
mod matmul;
mod real;
mod tiles;
pub(crate) mod vectorized;

pub(crate) use column_sums::ColumnSums;
pub(crate) use element::{Element, for_float_dtype, optional_slice, storage};
pub(crate) use filled::{
    Scattered, filled, filled_pair, filled_per_row, filled_with, map_tasks, scattered,
};
pub(crate) use lanes::{lane_max, lane_mean, lane_sum, slice_sum, slices_sum};
pub(crate) use matmul::matmul;
pub(crate) use real::Real;
pub(crate) use tiles::{Left, Product, Right, multiply, panel};
pub(crate) use vectorized::vectorized;
