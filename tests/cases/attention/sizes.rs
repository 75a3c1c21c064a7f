//! Sizes, and the shapes that follow from them.

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub b: usize,
    pub h: usize,
    pub kv: usize,
    pub sq: usize,
    pub sk: usize,
    pub d: usize,
}

/// `[B, H, Hkv, Sq, Sk, D]`
pub fn sizes([b, h, kv, sq, sk, d]: [usize; 6]) -> Sizes {
    Sizes { b, h, kv, sq, sk, d }
}

impl Sizes {
    /// Nothing if the size of a case is none of attention.
    pub(super) fn of(size: &[usize]) -> Option<Self> {
        match *size {
            [b, h, s, d] => Some(sizes([b, h, h, s, s, d])),
            [b, h, kv, sq, sk, d] => Some(sizes([b, h, kv, sq, sk, d])),
            _ => None,
        }
    }

    pub fn q(self) -> [usize; 4] {
        [self.b, self.h, self.sq, self.d]
    }

    /// And of v.
    pub fn k(self) -> [usize; 4] {
        [self.b, self.kv, self.sk, self.d]
    }

    /// Of the scores, and of the mask.
    pub fn scores(self) -> [usize; 4] {
        [self.b, self.h, self.sq, self.sk]
    }
}
