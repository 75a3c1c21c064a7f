//! One launch of a kernel: grid, block, arguments, and what it wrote.

use half::{bf16, f16};

/// Every byte of an output, of shared memory, before a kernel writes it: all ones is a NaN.
pub const POISON: u8 = 0xff;

/// The order in which the threads of a block, and the blocks of a grid, take their turns.
#[derive(Clone, Copy)]
pub enum Order {
    Forward,
    Reverse,
    /// Another random order each time all threads wait.
    Shuffled {
        seed: u32,
    },
}

/// What cases run in unless they say otherwise.
pub const EVERY_ORDER: &[Order] = &[Order::Forward, Order::Reverse, Order::Shuffled { seed: 1 }];

/// One launch of one kernel. Arguments are given in the order of the kernel's parameters.
pub struct Case {
    pub(super) kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    orders: Vec<Order>,
    arguments: Vec<Argument>,
}

struct Argument {
    kind: Kind,
    /// Not a parameter of the kernel, which reaches it through another argument.
    behind: bool,
    offset_bytes: usize,
    bytes: Vec<u8>,
    /// Where addresses of other arguments stand in it: byte, and place of the other.
    pointers: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Value,
    Input,
    Output,
    InOut,
    Null,
}

impl Case {
    /// `shared_bytes` is the dynamic shared memory of a block.
    pub fn new(kernel: &str, grid: [u32; 3], block: [u32; 3], shared_bytes: u32) -> Self {
        let orders = EVERY_ORDER.to_vec();
        Self { kernel: kernel.into(), grid, block, shared_bytes, orders, arguments: Vec::new() }
    }

    /// Replaces the orders. A single one suits kernels whose result may depend on it, such as sums
    /// of floats by `atomicAdd`.
    pub fn orders(mut self, orders: &[Order]) -> Self {
        self.orders = orders.to_vec();
        self
    }

    fn argument(mut self, kind: Kind, bytes: Vec<u8>) -> Self {
        let pointers = Vec::new();
        self.arguments.push(Argument { kind, behind: false, offset_bytes: 0, bytes, pointers });
        self
    }

    /// A number passed by value.
    pub fn value<T: Plain>(self, value: T) -> Self {
        self.argument(Kind::Value, to_bytes(&[value]))
    }

    /// A struct passed by value, as its bytes.
    pub fn value_bytes(self, bytes: &[u8]) -> Self {
        self.argument(Kind::Value, bytes.to_vec())
    }

    /// A buffer that the kernel only reads.
    pub fn input<T: Plain>(self, elements: &[T]) -> Self {
        self.argument(Kind::Input, to_bytes(elements))
    }

    /// A buffer of `len` elements that the kernel writes, poisoned before.
    pub fn output<T: Plain>(self, len: usize) -> Self {
        self.argument(Kind::Output, vec![POISON; len * size_of::<T>()])
    }

    /// A buffer that the kernel reads and writes.
    pub fn in_out<T: Plain>(self, elements: &[T]) -> Self {
        self.argument(Kind::InOut, to_bytes(elements))
    }

    /// A null pointer: an optional buffer that is absent.
    pub fn null(self) -> Self {
        self.argument(Kind::Null, Vec::new())
    }

    /// Moves the buffer just added by some bytes from its 16-byte alignment, as a view does.
    pub fn misaligned_by(mut self, offset_bytes: usize) -> Self {
        if let Some(last) = self.arguments.last_mut() {
            last.offset_bytes = offset_bytes;
        }
        self
    }

    /// The buffer just added is no parameter of the kernel: one of those holds its address.
    pub fn behind(mut self) -> Self {
        if let Some(last) = self.arguments.last_mut() {
            last.behind = true;
        }
        self
    }

    /// The buffer just added has at this byte the address of an argument, counted from 0 with those that are
    /// no parameters.
    pub fn pointing(mut self, at_byte: usize, to: usize) -> Self {
        if let Some(last) = self.arguments.last_mut() {
            last.pointers.push((at_byte, to));
        }
        self
    }

    /// The format that `runner.h` reads: little-endian, u32 but for the u64 lengths, offsets and pointers.
    pub(super) fn write(&self, file: &mut Vec<u8>) {
        let mut word = |value: u32| file.extend(value.to_le_bytes());
        let kernel = self.kernel.as_bytes();
        word(kernel.len() as u32);
        word(0);
        file.extend(kernel);
        let mut word = |value: u32| file.extend(value.to_le_bytes());
        self.grid.into_iter().chain(self.block).for_each(&mut word);
        word(self.shared_bytes);
        word(self.orders.len() as u32);
        for order in &self.orders {
            let (kind, seed) = match *order {
                Order::Forward => (0, 0),
                Order::Reverse => (1, 0),
                Order::Shuffled { seed } => (2, seed),
            };
            word(kind);
            word(seed);
        }
        word(self.arguments.len() as u32);
        for Argument { kind, behind, offset_bytes, bytes, pointers } in &self.arguments {
            file.extend((*kind as u32).to_le_bytes());
            file.extend(u32::from(*behind).to_le_bytes());
            file.extend((*offset_bytes as u64).to_le_bytes());
            file.extend((bytes.len() as u64).to_le_bytes());
            file.extend(bytes);
            file.extend((pointers.len() as u64).to_le_bytes());
            for number in pointers.iter().flat_map(|(at, to)| [*at, *to]) {
                file.extend((number as u64).to_le_bytes());
            }
        }
    }

    /// Bytes of the buffers that the kernel writes.
    pub(super) fn written(&self) -> impl Iterator<Item = usize> {
        let is_written = |of: &&Argument| matches!(of.kind, Kind::Output | Kind::InOut);
        self.arguments.iter().filter(is_written).map(|argument| argument.bytes.len())
    }
}

/// The buffers a case wrote, in the order of its arguments.
pub struct Outputs(pub(super) Vec<Vec<u8>>);

impl Outputs {
    pub fn bytes(&self, index: usize) -> &[u8] {
        &self.0[index]
    }

    pub fn get<T: Plain>(&self, index: usize) -> Vec<T> {
        from_bytes(&self.0[index])
    }
}

/// The numbers that buffers hold.
pub trait Plain: Copy {
    fn append(self, bytes: &mut Vec<u8>);
    fn parse(bytes: &[u8]) -> Self;
}

/// `plain!(f32)` is `impl Plain for f32 { .. to_le_bytes .. from_le_bytes .. }`.
macro_rules! plain {
    ($($t:ty)*) => {$(
        impl Plain for $t {
            fn append(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
            fn parse(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("one element"))
            }
        }
    )*};
}
plain!(u8 u16 u32 u64 i32 i64 f16 bf16 f32 f64);

fn to_bytes<T: Plain>(elements: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(elements));
    elements.iter().for_each(|element| element.append(&mut bytes));
    bytes
}

fn from_bytes<T: Plain>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(T::parse).collect()
}
