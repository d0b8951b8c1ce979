//! The kernel side of connmon. One file per hook, and [`sockets`], which the
//! agent runs; it and [`socket`] are the only places that read the kernel's
//! socket fields, [`task`] reads the running task's, [`emit`] is the only one that touches the ring buffer.
//!
//! What is shared with the agent (records, map names, globals) is defined in
//! `connmon-common`. Loads and attaches on 5.10 and later: no helper newer
//! than 5.8 but in the program whose comment says so, no loop but the walk's.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod accept;
mod connect;
mod emit;
mod globals;
mod nested;
mod set_state;
mod socket;
mod sockets;
mod task;

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers such as `bpf_probe_read_kernel` are offered to programs with a
/// GPL-compatible license only; connmon's sources are MIT OR Apache-2.0,
/// which are.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
