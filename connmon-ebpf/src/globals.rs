//! Read-only data that the loader sets before it loads a program. The verifier
//! knows the values, and removes a branch on a global that is 0. Names and
//! meanings are in `connmon_common::tuning`.

use aya_ebpf::Global;
use connmon_common::tuning::Field;
use core::ptr::read_volatile;

macro_rules! globals {
    ($($name:ident: $type:ty = $value:expr;)*) => {
        $(#[unsafe(no_mangle)]
        pub static $name: Global<$type> = Global::new($value);)*
    };
}

globals! {
    WAKE_BYTES: u64 = 1 << 20;
    DROP_LOOPBACK: u32 = 0;
    ONLY_NETNS: u32 = 0;
    OWNERS: u32 = 0;
    TRAFFIC: u32 = 0;
    OFFSETS_KNOWN: u32 = 0;
    TASK_BTF: u32 = 0;
}

#[unsafe(no_mangle)]
static OFFSETS: [u32; Field::COUNT] = [0; Field::COUNT];

/// The offset of a field.
#[inline(always)]
pub fn offset(field: Field) -> usize {
    // SAFETY: a reference to an entry. Volatile, since the loader sets it.
    unsafe { read_volatile(&raw const OFFSETS[field as usize]) as usize }
}
