//! What is connected now, read from the kernel's tables: the base of `list`,
//! `top` and of what `trace` knows at its start.

use std::collections::HashSet;
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
use connmon_host::reconcile::{WalkMessages, Walker, WalkerOptions, owners};
use connmon_host::sandbox::{Plan, Role};

use super::connection::Connection;
use crate::config::{Config, SourceChoice};
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

/// Reads the socket tables of the watched namespaces.
pub struct Reader {
    walker: Walker,
    messages: WalkMessages,
    roots: Roots,
    /// Which connections are hidden.
    pub filter: Filter,
    /// Address → country.
    pub locator: Locator,
}

impl Reader {
    /// Starts the walker, enters the sandboxes of both threads (`--sandbox`)
    /// and opens the country database. Whatever needs more privilege than that
    /// comes before.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let plan = Arc::new(Plan::new(config.sandbox, config.all_netns, true));
        let options = WalkerOptions {
            all_netns: config.all_netns,
            listeners: true,
            force_proc: config.source == SourceChoice::Proc,
            ..WalkerOptions::default()
        };
        let walker_plan = Arc::clone(&plan);
        let enter = move || walker_plan.enter(Role::Walker).map(drop);
        let (walker, messages) = Walker::spawn_after(options, enter)
            .context("cannot start the thread that reads the socket tables")?;
        plan.enter(Role::Tool)?;
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

    /// Reads the tables once.
    ///
    /// # Errors
    /// When the walker has ended.
    pub fn read(&mut self) -> anyhow::Result<Tables> {
        let requested = self.walker.request(Walk {
            trigger: Trigger::Interval,
            traffic: true,
            audit: true,
        });
        requested.map_err(|refused| {
            anyhow::anyhow!("bug: the socket tables cannot be requested: {refused:?}")
        })?;
        let mut tables = Tables::default();
        let mut netns = 0;
        let mut ephemeral = (0, 0);
        let mut listening = fold::Listening::default();
        // Where the connections of this namespace begin.
        let mut first = 0;
        loop {
            let message = self.messages.blocking_next();
            match message.context("bug: the thread that reads the socket tables has ended")? {
                WalkMessage::Begin(_) => {}
                WalkMessage::NamespaceBegin {
                    netns: id,
                    ephemeral: ports,
                    ..
                } => {
                    (netns, ephemeral) = (id, ports);
                    listening = fold::Listening::default();
                    first = tables.connections.len();
                }
                WalkMessage::Rows { rows, .. } => {
                    for row in &*rows {
                        self.row(netns, row, &mut listening, &mut tables);
                    }
                }
                // Directions need the whole namespace: a listener may come last.
                WalkMessage::NamespaceEnd { .. } => {
                    for live in &mut tables.connections[first..] {
                        let connection = &mut live.connection;
                        connection.direction = listening.direction(&connection.tuple, ephemeral);
                    }
                }
                WalkMessage::End(summary) => {
                    tables.unread = summary.reason.filter(|_| summary.unaudited > 0);
                    break;
                }
            }
        }
        self.owners(&mut tables);
        Ok(tables)
    }

    fn row(
        &mut self,
        netns: NetnsId,
        row: &Row,
        listening: &mut fold::Listening,
        tables: &mut Tables,
    ) {
        match row.state {
            state::LISTEN => {
                let (address, port) = (row.tuple.local, row.tuple.local_port);
                listening.insert(address, port);
                tables.listening.push(Listening {
                    netns,
                    address,
                    port,
                    owner: row.owner,
                });
            }
            state::SYN_SENT | state::SYN_RECV => {}
            _ if self.filter.hides(&row.tuple).is_some() => tables.hidden += 1,
            _ => tables.connections.push(Live {
                connection: Connection {
                    cookie: row.cookie,
                    netns,
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
