//! One source, three instruction sets.
//!
//! [`vectorized!`] compiles a plain Rust function for AVX-512, for AVX2 and for the baseline, and
//! picks one at run time. The bodies hold no intrinsics: they are loops over slices that the
//! compiler vectorises, and since neither reassociates or contracts floating-point arithmetic, all
//! three give the same bits.

/// Wraps `fn name<..>(args) { body }` into a function of that name which runs `body` compiled for
/// the widest vector unit of this CPU:
///
/// ```text
/// fn name(args) {
///     #[inline(always)] fn body(args) { .. }
///     #[target_feature(enable = "avx512f,..")] fn avx512(args) { body(args) }
///     #[target_feature(enable = "avx2")] fn avx2(args) { body(args) }
///     if has avx512 { avx512(args) } else if has avx2 { avx2(args) } else { body(args) }
/// }
/// ```
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident: $bound:path),+>)?
        ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])* #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)] #[allow(clippy::too_many_arguments)]
            fn body $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")] {
                $crate::cpu::vectorized::x86_variant!{ "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c";
                    avx512 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? }
                $crate::cpu::vectorized::x86_variant!{ "avx2,f16c";
                    avx2 $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? }
                match $crate::cpu::vectorized::instruction_set() {
                    // SAFETY: `instruction_set` found every feature that this variant enables.
                    $crate::cpu::vectorized::InstructionSet::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::vectorized::InstructionSet::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::vectorized::InstructionSet::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}

/// One `#[target_feature]` wrapper around the `body` that [`vectorized!`] declares.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_variant {
    ($features:literal; $name:ident $(<$($g:ident: $bound:path),+>)?
        ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        #[target_feature(enable = $features)] #[allow(clippy::too_many_arguments)]
        fn $name $(<$($g: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
    };
}

pub(crate) use vectorized;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_variant;

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum InstructionSet {
    Avx512,
    Avx2,
    Baseline,
}

/// The widest instruction set of this CPU that [`vectorized!`] and `tiles.rs` compile for; both wider ones
/// have fused multiply-adds.
///
/// `CANDLE_DROPOUT_SIMD=avx2` or `=baseline` in the environment asks for a narrower one, so that the
/// paths can be compared on one machine.
#[cfg(target_arch = "x86_64")]
pub(crate) fn instruction_set() -> InstructionSet {
    static CHOICE: std::sync::OnceLock<InstructionSet> = std::sync::OnceLock::new();
    *CHOICE.get_or_init(|| {
        let limit = std::env::var("CANDLE_DROPOUT_SIMD").unwrap_or_default();
        let has_avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma");
        let has_avx512 = has_avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match limit.as_str() {
            "baseline" => InstructionSet::Baseline,
            "avx2" if has_avx2 => InstructionSet::Avx2,
            _ if has_avx512 => InstructionSet::Avx512,
            _ if has_avx2 => InstructionSet::Avx2,
            _ => InstructionSet::Baseline,
        }
    })
}
