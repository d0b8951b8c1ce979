//! `iter/tcp`: what TCP sockets there are in a network namespace.
//!
//! ```c
//! // net/ipv4/tcp_ipv4.c; called with each full socket's lock held and the
//! // socket still in the table, and once with NULL at the end
//! DEFINE_BPF_ITER_FUNC(tcp, struct bpf_iter_meta *meta,
//!                      struct sock_common *sk_common, uid_t uid)
//! ```
//!
//! Every record goes to whoever reads the iterator. One that does not fit is
//! asked for again at the next read.

use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::{addr_of_mut, read_volatile};

use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_seq_write};
use connmon_common::state::{CLOSE, LISTEN, NEW_SYN_RECV, SYN_RECV, TIME_WAIT};
use connmon_common::wire::{EndsV4, EndsV6, Head, Live, kind};

use crate::socket::{AF_INET, AF_INET6, BtfSocket, Ends, Socket, is_v4_mapped, write_live_figures};

/// `struct bpf_iter__tcp` and, of `struct bpf_iter_meta`, what is read.
#[repr(C)]
struct Context {
    meta: *const *mut c_void,
    socket: *const u8,
}

/// Writes a [`Live`] of every connection and every handshake under way.
/// Listeners, which sock_diag has in a table of their own, and TIME_WAIT are
/// left out. Sockets get a cookie, so that later events carry it: 5.12.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
fn sockets(context: *const Context) -> i32 {
    // SAFETY: the kernel's context; volatile, so that each is one load.
    let (meta, socket) = unsafe {
        (
            read_volatile(&raw const (*context).meta),
            read_volatile(&raw const (*context).socket),
        )
    };
    if socket.is_null() {
        return 0;
    }
    let socket = BtfSocket(socket);
    let state = match socket.state() {
        CLOSE | TIME_WAIT | LISTEN => return 0,
        NEW_SYN_RECV => SYN_RECV,
        state => state,
    };
    // SAFETY: `meta` is never NULL and begins with the sequence file.
    let file = unsafe { read_volatile(meta) };
    let family = socket.family();
    if family == AF_INET6 {
        let remote = socket.v6_remote();
        if !is_v4_mapped(remote) {
            let local = socket.v6_local();
            let (local_port, remote_port) = socket.ports();
            let ends = EndsV6 {
                local,
                remote,
                local_port,
                remote_port,
                pad: 0,
            };
            write(file, &socket, state, ends);
            return 0;
        }
    } else if family != AF_INET {
        return 0;
    }
    let (local, remote) = socket.v4();
    let (local_port, remote_port) = socket.ports();
    let ends = EndsV4 {
        local,
        remote,
        local_port,
        remote_port,
        pad: 0,
    };
    write(file, &socket, state, ends);
    0
}

#[inline(always)]
fn write<E: Ends>(file: *mut c_void, socket: &BtfSocket, state: u8, ends: E) {
    let mut record = MaybeUninit::<Live<E>>::uninit();
    let out = record.as_mut_ptr();
    // SAFETY: every field of the record is written before it is read; helpers
    // on the pointers that the kernel gave.
    unsafe {
        let flags = write_live_figures(
            &socket.full(),
            socket.flags(),
            addr_of_mut!((*out).figures),
        );
        addr_of_mut!((*out).head).write(Head {
            kind: kind::LIVE,
            flags: flags | E::FLAGS,
            old: state,
            new: state,
            // That of the reader, who knows it.
            netns: 0,
            id: socket.id(),
            cookie: bpf_get_socket_cookie(socket.0.cast_mut().cast()),
        });
        addr_of_mut!((*out).ends).write(ends);
        bpf_seq_write(file.cast(), out.cast(), size_of::<Live<E>>() as u32);
    }
}
