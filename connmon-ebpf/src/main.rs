//! The kernel side of connmon: one file per hook, and [`sockets`], the scan of
//! the TCP socket table, which the agent runs. [`memory`] is how all of them
//! read the kernel, [`emit`] alone writes to the ring buffer.
//!
//! Records, map names and globals are defined in `connmon-common`. Linux 5.10
//! and later; a program that calls a helper newer than 5.8 names it.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod accept;
mod connect;
mod emit;
mod globals;
mod memory;
mod misses;
mod set_state;
mod socket;
mod sockets;
mod stats;
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
