use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_dropout::nn::rnn::LSTMConfig;
use candle_dropout::nn::{self, Module, VarBuilder};
use candle_dropout::{Lstm, MaskGenerator, RecurrentDropout};

/// Characters, an LSTM, and what comes next.
pub struct CharLstm {
    embedding: nn::Embedding,
    lstm: Lstm,
    head: nn::Linear,
}

impl CharLstm {
    pub fn new(
        (embedding, hidden): (usize, usize),
        dropout: RecurrentDropout,
        generator: Arc<MaskGenerator>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let config = LSTMConfig::default();
        Ok(Self {
            embedding: nn::embedding(128, embedding, vb.pp("embedding"))?,
            lstm: Lstm::new(embedding, hidden, config, dropout, generator, vb.pp("lstm"))?,
            head: nn::linear(hidden, 128, vb.pp("head"))?,
        })
    }

    /// The logits of the next character after each of `[B, T]`: `[B T, 128]`.
    pub fn logits(&self, characters: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.embedding.forward(characters)?;
        let hs = self.lstm.forward(&xs, train)?;
        self.head.forward(&hs.flatten_to(1)?)
    }
}
