//! What is connected now, read from the kernel's tables: the base of `list`,
//! `top` and of what `trace` knows at its start.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Context as _;
use connmon_common::state;
use connmon_core::event::{NetnsId, Owner, Traffic};
use connmon_core::fold::country_of;
use connmon_core::fold::{self, Direction, Filter};
use connmon_core::geo::{Country, Database, Locator};
use connmon_core::scan::{Row, Trigger, Walk, WalkMessage};
use connmon_host::reconcile::netns::Roots;
use connmon_host::reconcile::{Walker, WalkerOptions, owners};
use connmon_host::sandbox::Plan;

use super::connection::Connection;
use crate::config::Config;
use crate::database;

/// One connection of the kernel's tables.
#[derive(Clone, Debug)]
pub struct Live {
    /// Endpoints, direction and owner.
    pub connection: Connection,
    /// TCP state.
    pub state: u8,
    /// Inode of the socket, or 0.
    inode: u32,
    /// What it moved, where the kernel reports it.
    pub traffic: Option<Traffic>,
    /// Country of the remote.
    pub country: Country,
}

/// A listening socket.
#[derive(Clone, Debug)]
pub struct Listening {
    /// Namespace inode.
    pub netns: NetnsId,
    /// Local address; unspecified for a wildcard.
    pub address: IpAddr,
    /// Local port.
    pub port: u16,
    /// Owner; pid 0 when unknown.
    pub owner: Owner,
}

/// The kernel's tables at one moment, after the filters.
#[derive(Debug, Default)]
pub struct Tables {
    /// Connections, handshakes under way not among them.
    pub connections: Vec<Live>,
    /// Listening sockets.
    pub listening: Vec<Listening>,
    /// Connections that the filters hide.
    pub hidden: usize,
    /// Why some namespaces could not be read.
    pub unread: Option<String>,
}

/// Reads the tables of the watched namespaces.
pub struct Reader {
    walker: Walker,
    messages: connmon_host::reconcile::WalkMessages,
    roots: Roots,
    filter: Filter,
    locator: Locator,
}

impl Reader {
    /// Starts the walker, closes both threads in (`--sandbox`) and opens the
    /// country database. Whatever needs more privilege than reading the
    /// tables comes before.
    ///
    /// # Errors
    /// When either cannot be had, and with `--sandbox strict` when a thread
    /// cannot be closed in.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let plan = Arc::new(Plan::new(config.sandbox, config.all_netns, true));
        let options = WalkerOptions {
            all_netns: config.all_netns,
            listeners: true,
            force_proc: config.source == crate::config::SourceChoice::Proc,
            ..WalkerOptions::default()
        };
        let (walker, messages) = Walker::spawn_after(options, {
            let plan = Arc::clone(&plan);
            move || plan.enter_walker().map(drop).map_err(io::Error::other)
        })
        .context("cannot start the reconcile thread")?;
        plan.enter_tool()?;
        let database = match &config.geoip_database {
            None => Database::embedded()?,
            Some(path) => {
                database::open(path).map_err(|error| config.refused("geoip.database", error))?
            }
        };
        Ok(Self {
            walker,
            messages,
            roots: Roots::default(),
            filter: Filter::new(&config.remote_filter()),
            locator: Locator::new(database.into()),
        })
    }

    /// Address → country.
    pub fn locator(&mut self) -> &mut Locator {
        &mut self.locator
    }

    /// The country database.
    pub fn database(&self) -> Arc<Database> {
        Arc::clone(self.locator.database())
    }

    /// The remote filter.
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Reads the tables once.
    ///
    /// # Errors
    /// When the walker is gone.
    pub fn read(&mut self) -> anyhow::Result<Tables> {
        self.walker
            .request(Walk {
                trigger: Trigger::Interval,
                traffic: true,
                audit: true,
            })
            .map_err(|refused| {
                anyhow::anyhow!("the reconcile thread takes no walk: {refused:?}")
            })?;
        let mut tables = Tables::default();
        let mut namespace = Namespace::default();
        loop {
            let message = self
                .messages
                .blocking_next()
                .context("the reconcile thread has ended")?;
            match message {
                WalkMessage::Begin(_) => {}
                WalkMessage::NamespaceBegin {
                    netns, ephemeral, ..
                } => {
                    namespace = Namespace {
                        netns,
                        ephemeral,
                        ..Namespace::default()
                    };
                }
                WalkMessage::Rows { rows, .. } => self.rows(&rows, &mut namespace, &mut tables),
                WalkMessage::NamespaceEnd { .. } => namespace.finish(&mut tables),
                WalkMessage::End(summary) => {
                    if summary.unaudited > 0 {
                        tables.unread = summary.reason;
                    }
                    break;
                }
            }
        }
        self.owners(&mut tables);
        Ok(tables)
    }

    fn rows(&mut self, rows: &[Row], namespace: &mut Namespace, tables: &mut Tables) {
        for row in rows {
            match row.state {
                state::LISTEN => {
                    let (address, port) = (row.tuple.local, row.tuple.local_port);
                    namespace.listening.insert(address, port);
                    tables.listening.push(Listening {
                        netns: namespace.netns,
                        address,
                        port,
                        owner: row.owner,
                    });
                }
                state::SYN_SENT | state::SYN_RECV => {}
                _ if self.filter.hides(&row.tuple).is_some() => tables.hidden += 1,
                _ => namespace.connections.push(Live {
                    connection: Connection {
                        cookie: row.cookie,
                        netns: namespace.netns,
                        tuple: row.tuple,
                        direction: Direction::Unknown,
                        owner: row.owner,
                    },
                    state: row.state,
                    inode: row.inode,
                    traffic: row.traffic,
                    country: country_of(&row.tuple, &mut self.locator),
                }),
            }
        }
    }

    fn owners(&self, tables: &mut Tables) {
        let inodes = tables.connections.iter().map(|live| live.inode);
        let wanted: HashSet<u32> = inodes.filter(|&inode| inode != 0).collect();
        let found = owners::find(&self.roots, &wanted);
        for live in &mut tables.connections {
            if let Some(owner) = found.get(&live.inode) {
                live.connection.owner = *owner;
            }
        }
    }
}

/// What is known of the namespace whose rows arrive.
#[derive(Default)]
struct Namespace {
    netns: NetnsId,
    ephemeral: (u16, u16),
    listening: fold::Listening,
    connections: Vec<Live>,
}

impl Namespace {
    /// Directions need the whole namespace: a listener may come last.
    fn finish(&mut self, tables: &mut Tables) {
        for mut live in self.connections.drain(..) {
            live.connection.direction = self
                .listening
                .direction(&live.connection.tuple, self.ephemeral);
            tables.connections.push(live);
        }
    }
}
