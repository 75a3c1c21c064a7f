use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::super::rate_schedule::ScheduledRate;
use super::super::site::Site;
use super::super::zoneout::Zone;
use super::{MaskPer, RecurrentDropout};
use crate::functional::{broadcast_dropout, dropout};
use crate::mask::{DropMask, MaskGenerator};

/// The places of a recurrent layer where something may be dropped: its sites, or the masks of one call.
#[derive(Clone, Debug, PartialEq)]
struct Places<Drop, Zone> {
    per: MaskPer,
    /// On what enters the products of a step.
    input: Option<Drop>,
    state: Option<Drop>,
    candidate: Option<Drop>,
    /// Between a step's old and new.
    cell: Option<Zone>,
    new_state: Option<Zone>,
}

/// The sites of a recurrent layer.
#[derive(Clone, Debug)]
pub(super) struct Sites(Places<Site, Site>);

impl Sites {
    /// Those of `layer`, which has a cell or none.
    pub(super) fn new(
        layer: &str,
        dropout: RecurrentDropout,
        has_cell: bool,
        generator: &Arc<MaskGenerator>,
    ) -> Result<Self> {
        let site = |rate: &str, drop_p: f64| {
            Site::new(drop_p, generator.clone()).checked(&format!("{layer}: {rate}")).map(Some)
        };
        let per = match dropout {
            RecurrentDropout::Variational { .. } => MaskPer::Sequence,
            RecurrentDropout::NoMemoryLoss { masks, .. } => masks,
            _ => MaskPer::Step,
        };
        let nothing =
            Places { per, input: None, state: None, candidate: None, cell: None, new_state: None };
        Ok(Self(match dropout {
            RecurrentDropout::None => nothing,
            RecurrentDropout::Variational { input_p, state_p }
            | RecurrentDropout::Naive { input_p, state_p } => Places {
                input: site("input_p", input_p)?,
                state: site("state_p", state_p)?,
                ..nothing
            },
            RecurrentDropout::NoMemoryLoss { drop_p, .. } => {
                Places { candidate: site("candidate", drop_p)?, ..nothing }
            }
            RecurrentDropout::Zoneout { cell_p, .. } if !has_cell && cell_p != 0. => bail!(
                "{layer}: cell_p: expected 0, since this layer has no cell, got {cell_p}; give state_p"
            ),
            RecurrentDropout::Zoneout { cell_p, state_p } => Places {
                cell: if has_cell { site("cell_p", cell_p)? } else { None },
                new_state: site("state_p", state_p)?,
                ..nothing
            },
        }))
    }

    /// The same sites, all with the rate of a schedule.
    pub(super) fn following(self, rate: &ScheduledRate) -> Self {
        let follow = |site: Option<Site>| site.map(|site| site.following(rate));
        let Self(Places { per, input, state, candidate, cell, new_state }) = self;
        Self(Places {
            per,
            input: follow(input),
            state: follow(state),
            candidate: follow(candidate),
            cell: follow(cell),
            new_state: follow(new_state),
        })
    }

    /// The masks of one call: a key for each site if `train`.
    pub(super) fn next_masks(&self, layer: &str, train: bool) -> Result<RecurrentMasks> {
        let drop = |site: &Option<Site>| {
            site.as_ref().map(|site| site.next_mask(layer, train)).transpose()
        };
        let zone = |site: &Option<Site>| {
            site.as_ref().map(|site| Zone::next(site, layer, train)).transpose()
        };
        let Self(Places { per, input, state, candidate, cell, new_state }) = self;
        let places = Places {
            per: *per,
            input: drop(input)?,
            state: drop(state)?,
            candidate: drop(candidate)?,
            cell: zone(cell)?,
            new_state: zone(new_state)?,
        };
        Ok(RecurrentMasks { places, batch: None, first_step: 0 })
    }
}

/// The masks of one call of a recurrent layer: for a sequence that is given in parts.
///
/// A mask a sequence has the shape `[B, C]`. One a step is that part of the mask of `[T, B, C]`, row `t B + b`, so that
/// it depends on no later step: a sequence that is split, each part with its [`window`](Self::window), sees the masks
/// of the whole.
#[derive(Clone, Debug, PartialEq)]
pub struct RecurrentMasks {
    places: Places<DropMask, Zone>,
    /// Samples of the whole batch, and the first of this part.
    batch: Option<(usize, usize)>,
    first_step: usize,
}

impl RecurrentMasks {
    /// The same masks for the part of a batch of `batch` samples that begins at `first_sample`, from the step
    /// `first_step` of the sequence on. A new window replaces the old.
    pub fn window(&self, batch: usize, first_sample: usize, first_step: usize) -> Self {
        Self { batch: Some((batch, first_sample)), first_step, ..self.clone() }
    }

    /// Refuses a part that does not lie in the batch.
    pub(super) fn check(&self, layer: &str, samples: usize) -> Result<()> {
        match self.batch {
            Some((batch, first)) if first.saturating_add(samples) > batch => bail!(
                "{layer}: masks.window: expected first_sample + samples <= batch, got {first} + {samples} > \
                 {batch}; pass the size of the whole batch"
            ),
            _ => Ok(()),
        }
    }

    /// Samples of the whole and the first of `samples`.
    fn samples(&self, samples: usize) -> (usize, usize) {
        self.batch.unwrap_or((samples, 0))
    }

    /// The mask over `[B, C]` at a step of this part.
    fn part(&self, drop: &DropMask, step: usize, like: &Tensor) -> Result<DropMask> {
        // The passes of a McDropout find the samples of a mask a sequence by themselves.
        if drop.is_repeated() && self.places.per == MaskPer::Sequence && self.batch.is_none() {
            return Ok(drop.clone());
        }
        let (samples, cols) = like.dims2()?;
        let (batch, first) = self.samples(samples);
        let row = match self.places.per {
            MaskPer::Sequence => first,
            MaskPer::Step => {
                self.first_step.saturating_add(step).saturating_mul(batch).saturating_add(first)
            }
        };
        Ok(drop.window(&[row.saturating_add(samples), cols], &[row, 0]))
    }

    fn dropped(&self, drop: &Option<DropMask>, step: usize, x: &Tensor) -> Result<Tensor> {
        match drop {
            Some(drop) if !drop.is_none() => dropout(x, &self.part(drop, step, x)?),
            _ => Ok(x.clone()),
        }
    }

    fn updated(
        &self,
        zone: &Option<Zone>,
        step: usize,
        new: &Tensor,
        old: &Tensor,
    ) -> Result<Tensor> {
        let Some(zone) = zone else { return Ok(new.clone()) };
        match zone {
            Zone::Drawn(drop) => {
                let part = self.part(drop, step, new)?;
                zone.part(|_| part).update(new, old)
            }
            Zone::Expected(_) => zone.update(new, old),
        }
    }

    /// The inputs `[T, B, in]` of all steps.
    pub(super) fn inputs(&self, xs: &Tensor) -> Result<Tensor> {
        let Some(drop) = self.places.input.as_ref().filter(|drop| !drop.is_none()) else {
            return Ok(xs.clone());
        };
        let (steps, samples, cols) = xs.dims3()?;
        let (batch, first) = self.samples(samples);
        match self.places.per {
            MaskPer::Sequence if drop.is_repeated() && self.batch.is_none() => {
                broadcast_dropout(&xs.transpose(0, 1)?, 1, drop)?.transpose(0, 1)
            }
            MaskPer::Sequence => {
                broadcast_dropout(xs, 0, &drop.window(&[batch, cols], &[first, 0]))
            }
            MaskPer::Step => {
                let full = [self.first_step.saturating_add(steps), batch, cols];
                dropout(xs, &drop.window(&full, &[self.first_step, first, 0]))
            }
        }
    }

    /// The state that enters the products of a step.
    pub(super) fn state(&self, step: usize, h: &Tensor) -> Result<Tensor> {
        self.dropped(&self.places.state, step, h)
    }

    /// The candidate of an update.
    pub(super) fn candidate(&self, step: usize, g: &Tensor) -> Result<Tensor> {
        self.dropped(&self.places.candidate, step, g)
    }

    /// The cell after a step.
    pub(super) fn cell(&self, step: usize, new: &Tensor, old: &Tensor) -> Result<Tensor> {
        self.updated(&self.places.cell, step, new, old)
    }

    /// The state after a step.
    pub(super) fn new_state(&self, step: usize, new: &Tensor, old: &Tensor) -> Result<Tensor> {
        self.updated(&self.places.new_state, step, new, old)
    }
}
