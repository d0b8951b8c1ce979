//! `--web.config.file`: verdicts on files of every kind, and what a server
//! with one does to clients, over real TLS.

#[expect(dead_code, reason = "what only tests/http.rs needs of it")]
mod web_support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use connmon_http::{Limits, webconfig};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tempfile::TempDir;
use web_support::{Reply, Running, Start, parse};

/// A directory with an authority, certificates of it, and others.
struct Kit {
    directory: TempDir,
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn client_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![format!("{name}.example")]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names.extend([
        SanType::Rfc822Name(format!("{name}@mail.example").try_into().unwrap()),
        SanType::URI(format!("spiffe://example/{name}").try_into().unwrap()),
        SanType::IpAddress("10.1.2.3".parse().unwrap()),
    ]);
    params
}

impl Kit {
    fn new() -> Self {
        let kit = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        let ca = authority("kit authority");
        kit.write("ca.crt", &ca.pem());
        kit.server("server", &ca);
        kit.write("other.key", &KeyPair::generate().unwrap().serialize_pem());
        let key = KeyPair::generate().unwrap();
        let certificate = client_params("scraper").signed_by(&key, &ca).unwrap();
        kit.write("client.crt", &certificate.pem());
        kit.write("client.key", &key.serialize_pem());
        let stranger = authority("a stranger");
        let certificate = client_params("stranger")
            .signed_by(&key, &stranger)
            .unwrap();
        kit.write("stranger.crt", &certificate.pem());
        kit.write("stranger.key", &key.serialize_pem());
        // What `openssl req -x509` makes: its own authority.
        let mut params = client_params("selfsigned");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        kit.write("self.crt", &certificate.pem());
        kit.write("self.key", &key.serialize_pem());
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let mut extension =
            rcgen::CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions.push(extension);
        let certificate = params.signed_by(&key, &ca).unwrap();
        kit.write("critical.crt", &certificate.pem());
        kit.write("critical.key", &key.serialize_pem());
        let key = kit.read("server.key");
        for label in ["RSA", "EC"] {
            let mislabelled = key.replace("PRIVATE KEY", &format!("{label} PRIVATE KEY"));
            kit.write(&format!("labelled_{label}.key"), &mislabelled);
        }
        let keys = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/keys");
        for entry in fs::read_dir(keys).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), kit.path(entry.file_name().to_str().unwrap())).unwrap();
        }
        kit.write(
            "junk.pem",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        );
        kit
    }

    /// A server certificate of `ca` with its key.
    fn server(&self, name: &str, ca: &Authority) {
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, ca).unwrap();
        self.write(&format!("{name}.crt"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// A server with this web configuration.
    fn run(&self, config: &str) -> Running {
        self.run_with(config, Limits::default())
    }

    fn run_with(&self, config: &str, limits: Limits) -> Running {
        Start {
            web_config: Some(self.write("web.yml", config)),
            limits,
            ..Start::default()
        }
        .run()
    }

    /// A TLS connection whose client offers these protocols.
    async fn connect(
        &self,
        address: std::net::SocketAddr,
        protocols: &[&[u8]],
    ) -> tokio_rustls::client::TlsStream<tokio::net::TcpStream> {
        let mut config = self.client(None);
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap()
    }

    /// A TLS client that trusts the kit's authority and may show a
    /// certificate.
    fn client(&self, identity: Option<&str>) -> ClientConfig {
        self.client_of(identity, rustls::DEFAULT_VERSIONS, &self.read("ca.crt"))
    }

    fn client_of(
        &self,
        identity: Option<&str>,
        versions: &[&'static rustls::SupportedProtocolVersion],
        trusted: &str,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(trusted.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots);
        match identity {
            None => builder.with_no_client_auth(),
            Some(name) => {
                let certificate = self.read(&format!("{name}.crt"));
                let key = self.read(&format!("{name}.key"));
                builder
                    .with_client_auth_cert(
                        vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                        PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                    )
                    .unwrap()
            }
        }
    }
}

const TLS: &str = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n";

type Tls = StreamOwned<ClientConnection, TcpStream>;

fn connect(server: &Running, config: ClientConfig) -> Tls {
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    StreamOwned::new(connection, server.connect())
}

/// One GET over TLS.
fn get(
    server: &Running,
    config: ClientConfig,
    path: &str,
    headers: &str,
) -> Result<Reply, std::io::Error> {
    let mut stream = connect(server, config);
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
    )?;
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        // The other end may hang up once everything is sent.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && !bytes.is_empty() => {}
        Err(error) => return Err(error),
    }
    Ok(parse(&bytes))
}

fn basic(credentials: &str) -> String {
    let encoded = base64::engine::general_purpose::STANDARD.encode(credentials);
    format!("Authorization: Basic {encoded}\r\n")
}

/// Every fixture, written to the kit: its name, path and first line.
fn fixtures(kit: &Kit) -> Vec<(String, PathBuf, String)> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/web");
    let entries = fs::read_dir(fixtures).unwrap();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let mut text = fs::read_to_string(entry.path()).unwrap();
            for pem in ["server.crt", "server.key", "ca.crt"] {
                let indented = kit.read(pem).trim_end().replace('\n', "\n    ");
                text = text.replace(&format!("@{pem}@"), &indented);
            }
            let path = kit.write(&name, &text);
            (name, path, text.lines().next().unwrap().to_owned())
        })
        .collect()
}

/// The toolkit itself, as Debian's promtool has it, agrees.
#[test]
fn promtool_agrees() {
    // What docs/web.md lists, what the toolkit reports only when it serves (the
    // suite that HTTP/2 needs) or only since (a CA file without any).
    const OURS: [&str; 17] = [
        "ciphers_cbc_http2.yml",
        "ciphers_none_left.yml",
        "ciphers_without_http2.yml",
        "client_ca_no_certs.yml",
        "headers_control.yml",
        "http2_quoted.yml",
        "rate_burst_08.yml",
        "rate_interval_09.yml",
        "rate_nanoseconds.yml",
        "rate_negative.yml",
        "second_document.yml",
        "users_block_scalar.yml",
        "version_none_left.yml",
        "version_null_capital.yml",
        "version_too_old.yml",
        "yaml_1_2.yml",
        "yaml_directive.yml",
    ];
    let kit = Kit::new();
    let (mut agreed, mut newer) = (0, 0);
    for (name, path, _) in fixtures(&kit) {
        let output = std::process::Command::new("promtool")
            .args(["check", "web-config"])
            .arg(&path)
            .output();
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: verdicts against promtool: {error}");
                assert!(std::env::var("CI").as_deref() != Ok("true"), "{error}");
                return;
            }
        };
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let ours = webconfig::check(&path);
        let ours_knows = match &ours {
            Ok(_) => true,
            Err(error) => !error.to_string().contains("unknown key"),
        };
        if said.contains("not found in type") && ours_knows {
            // A key newer than this promtool, which looks no further.
            newer += 1;
        } else if !OURS.contains(&name.as_str()) {
            agreed += 1;
            assert_eq!(
                ours.is_ok(),
                output.status.success(),
                "{name}: {ours:?}; {said}"
            );
        }
    }
    println!("{agreed} verdicts agree, {newer} files have newer keys");
    assert!(agreed >= 80, "{agreed} agreed, {newer} newer");
}

#[test]
fn verdicts_are_the_toolkits() {
    let kit = Kit::new();
    let (mut good, mut bad) = (0, 0);
    for (name, path, expected) in fixtures(&kit) {
        let verdict = webconfig::check(&path).map_err(|error| error.to_string());
        match (expected.strip_prefix("# bad: "), verdict) {
            (None, Ok(_)) if expected == "# good" => good += 1,
            (Some(part), Err(error)) => {
                bad += 1;
                assert!(error.contains(part), "{name}: {error}");
                assert!(error.contains(&name), "{name}: names the file: {error}");
                assert!(!error.contains('\n'), "{name}: one line: {error}");
                assert!(!error.contains("spring-tide"), "{name}: a secret: {error}");
            }
            (_, verdict) => panic!("{name}: {expected}, but {verdict:?}"),
        }
    }
    assert!(good >= 40 && bad >= 50, "{good} good, {bad} bad");
    let slow = kit.write(
        "slow.yml",
        "basic_auth_users:\n  amy: $2y$18$4VeFDzXIoPHKnKTU3O3GH.N.vZu06CVqczYZ8WvfzrddFU6tGqjR.\n",
    );
    let [remark] = &webconfig::check(&slow).unwrap()[..] else {
        panic!("no remark");
    };
    assert!(remark.contains("slow.yml: line 2: basic_auth_users.amy: a check of cost 18"));
    let hostile = kit.write("hostile.yml", "\"a\\e[31m\\u202e\\u200bb\": 1\n");
    let error = webconfig::check(&hostile).unwrap_err().to_string();
    assert!(
        error.contains("hostile.yml:1: a\u{fffd}[31m\u{fffd}\u{fffd}b: unknown key"),
        "{error}"
    );
    let missing = webconfig::check(&kit.path("nowhere.yml"));
    assert!(missing.unwrap_err().to_string().contains("No such file"));
    fs::write(kit.path("latin1.yml"), b"# caf\xe9\n\n").unwrap();
    let error = webconfig::check(&kit.path("latin1.yml")).unwrap_err();
    assert!(error.to_string().contains("latin1.yml:1: not valid UTF-8"));
}

/// Bytes swapped, dropped, doubled: a verdict, never a panic.
#[test]
fn mangled_files_get_a_verdict() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/web");
    let texts: Vec<Vec<u8>> = fs::read_dir(fixtures)
        .unwrap()
        .map(|entry| fs::read(entry.unwrap().path()).unwrap())
        .collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    let (mut good, mut bad) = (0, 0);
    for round in 0..6000 {
        let mut bytes = texts[round % texts.len()].clone();
        for _ in 0..=random(4) {
            if bytes.is_empty() {
                break;
            }
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = b" \n:-*&[]{}\"'<~!|>#\t0"[random(20)],
                1 => drop(bytes.remove(at)),
                2 => bytes.insert(at, bytes[at]),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        match webconfig::parse(&text, Path::new("mangled/web.yml")) {
            Ok(_) => good += 1,
            Err(error) => {
                assert!(error.to_string().starts_with("mangled/web.yml"), "{error}");
                bad += 1;
            }
        }
    }
    assert!(good > 100 && bad > 100, "{good} {bad}");
}

#[test]
fn relative_paths_are_meant_from_the_file() {
    let kit = Kit::new();
    fs::create_dir(kit.path("sub")).unwrap();
    for name in ["server.crt", "server.key"] {
        fs::rename(kit.path(name), kit.path(&format!("sub/{name}"))).unwrap();
    }
    assert!(webconfig::check(&kit.write("sub/web.yml", TLS)).is_ok());
    assert!(webconfig::check(&kit.write("web.yml", TLS)).is_err());
    let absolute = TLS.replace(
        "_file: ",
        &format!("_file: {}/sub/", kit.directory.path().display()),
    );
    assert!(webconfig::check(&kit.write("web.yml", &absolute)).is_ok());
}

#[test]
fn tls_serves_and_plain_http_gets_400() {
    let kit = Kit::new();
    let server = kit.run(TLS);
    let reply = get(&server, kit.client(None), "/metrics", "").unwrap();
    assert_eq!(reply.status, 200);
    assert!(reply.text().ends_with("report 1\n"));
    let plain = server.get("/metrics", "");
    assert_eq!(plain.status, 400);
    assert_eq!(
        plain.text(),
        "Client sent an HTTP request to an HTTPS server.\n"
    );
    // A client that trusts somebody else refuses the server.
    let stranger = authority("somebody else").pem();
    let config = kit.client_of(None, rustls::DEFAULT_VERSIONS, &stranger);
    assert!(get(&server, config, "/metrics", "").is_err());
    assert!(get(&server, kit.client(None), "/-/healthy", "").is_ok());
}

#[test]
fn versions_suites_and_curves_are_as_configured() {
    let kit = Kit::new();
    let tls12 = || kit.client_of(None, &[&rustls::version::TLS12], &kit.read("ca.crt"));
    let tls13 = || kit.client_of(None, &[&rustls::version::TLS13], &kit.read("ca.crt"));
    let group = |name| {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.kx_groups.retain(|group| group.name() == name);
        let mut roots = RootCertStore::empty();
        let ca = kit.read("ca.crt");
        roots
            .add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap())
            .unwrap();
        ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    };
    let ok = |server: &Running, config| get(server, config, "/-/healthy", "").is_ok();

    let server = kit.run(TLS);
    assert!(ok(&server, tls12()) && ok(&server, tls13()));
    let server = kit.run(&format!("{TLS}  min_version: TLS13\n"));
    assert!(!ok(&server, tls12()) && ok(&server, tls13()));
    let server = kit.run(&format!(
        "{TLS}  min_version: TLS10\n  max_version: TLS12\n"
    ));
    assert!(ok(&server, tls12()) && !ok(&server, tls13()));

    let suites = "  max_version: TLS12\n  cipher_suites:\n  - TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256\n  - TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256\n";
    let server = kit.run(&format!("{TLS}{suites}"));
    let mut stream = connect(&server, tls12());
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    // The client would rather have AES-256; the server's order counts.
    let suite = stream.conn.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(
        suite,
        rustls::CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
    );
    // Only RSA suites, and the certificate is ECDSA: nothing in common.
    let rsa = "  max_version: TLS12\n  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]\n";
    assert!(!ok(&kit.run(&format!("{TLS}{rsa}")), tls12()));

    let server = kit.run(&format!("{TLS}  curve_preferences: [CurveP384]\n"));
    assert!(ok(&server, group(rustls::NamedGroup::secp384r1)));
    assert!(!ok(&server, group(rustls::NamedGroup::X25519)));
    // It is not available: the default curves.
    let server = kit.run(&format!("{TLS}  curve_preferences: [CurveP521]\n"));
    assert!(ok(&server, group(rustls::NamedGroup::X25519)));
}

#[test]
fn client_certificates_are_asked_for_as_configured() {
    let kit = Kit::new();
    let none = None;
    let (good, stranger, own) = (Some("client"), Some("stranger"), Some("self"));
    // Policy, further keys, and who is let in: nobody's certificate, the
    // authority's, a stranger's, a self-signed one.
    for (policy, more, expected) in [
        ("NoClientCert", "", [true, true, true, true]),
        ("RequestClientCert", "", [true, true, true, true]),
        ("RequireAnyClientCert", "", [false, true, true, true]),
        ("RequireClientCert", "", [false, true, true, true]),
        (
            "VerifyClientCertIfGiven",
            "  client_ca_file: ca.crt\n",
            [true, true, false, false],
        ),
        // Nothing verifies without an authority.
        ("VerifyClientCertIfGiven", "", [true, false, false, false]),
        (
            "RequireAndVerifyClientCert",
            "  client_ca_file: ca.crt\n",
            [false, true, false, false],
        ),
        // A certificate that is its own authority.
        (
            "RequireAndVerifyClientCert",
            "  client_ca_file: self.crt\n",
            [false, false, false, true],
        ),
    ] {
        let server = kit.run(&format!("{TLS}  client_auth_type: {policy}\n{more}"));
        for (identity, expected) in [none, good, stranger, own].into_iter().zip(expected) {
            let reply = get(&server, kit.client(identity), "/-/healthy", "");
            assert_eq!(
                reply.is_ok(),
                expected,
                "{policy} {more} {identity:?}: {reply:?}"
            );
        }
    }
}

#[test]
fn client_names_are_matched_exactly() {
    let kit = Kit::new();
    for (san, expected) in [
        ("scraper.example", true),
        ("scraper@mail.example", true),
        ("spiffe://example/scraper", true),
        ("10.1.2.3", true),
        ("example", false),
        ("*.example", false),
        ("Scraper.example", false),
        ("scraper", false),
    ] {
        let server = kit.run(&format!(
            "{TLS}  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.crt\n  client_allowed_sans: [nobody, \"{san}\"]\n"
        ));
        for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13]] {
            let config = kit.client_of(Some("client"), versions, &kit.read("ca.crt"));
            let reply = get(&server, config, "/-/healthy", "");
            assert_eq!(reply.is_ok(), expected, "{san}: {reply:?}");
        }
    }
}

#[test]
fn http2_is_spoken_unless_switched_off() {
    let kit = Kit::new();
    for (more, expected) in [
        ("", "h2"),
        ("http_server_config:\n  http2: false\n", "http/1.1"),
    ] {
        let server = kit.run(&format!("{TLS}{more}"));
        runtime().block_on(async {
            let stream = kit.connect(server.address, &[b"h2", b"http/1.1"]).await;
            let protocol = stream.get_ref().1.alpn_protocol().unwrap().to_vec();
            assert_eq!(protocol, expected.as_bytes());
            if expected != "h2" {
                return;
            }
            let io = hyper_util::rt::TokioIo::new(stream);
            let executor = hyper_util::rt::TokioExecutor::new();
            let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io)
                .await
                .unwrap();
            tokio::spawn(connection);
            for (method, status, length) in [
                ("GET", 200, true),
                ("HEAD", 200, false),
                ("POST", 405, true),
            ] {
                let request = hyper::Request::builder()
                    .method(method)
                    .uri("https://localhost/metrics")
                    .body(String::new())
                    .unwrap();
                let response = sender.send_request(request).await.unwrap();
                assert_eq!(response.status(), status, "{method}");
                let length_header = response.headers()["content-length"]
                    .to_str()
                    .unwrap()
                    .to_owned();
                assert_ne!(length_header, "0");
                let body = http_body_util::BodyExt::collect(response.into_body())
                    .await
                    .unwrap()
                    .to_bytes();
                let expected = if length {
                    length_header.parse().unwrap()
                } else {
                    0
                };
                assert_eq!(body.len(), expected, "{method}");
            }
        });
    }
}

#[test]
fn users_have_to_show_their_password() {
    let kit = Kit::new();
    let hash = bcrypt::hash("spring-tide", 5).unwrap();
    let server = kit.run(&format!("basic_auth_users:\n  amy: {hash}\n"));
    for path in ["/metrics", "/", "/api/v1/summary", "/nothing"] {
        let reply = server.get(path, "");
        assert_eq!(reply.status, 401, "{path}");
        assert_eq!(reply.header("www-authenticate"), Some("Basic"), "{path}");
    }
    for path in ["/-/healthy", "/-/ready"] {
        assert_eq!(server.get(path, "").status, 200, "{path}");
    }
    for (credentials, status) in [
        ("amy:spring-tide", 200),
        ("amy:neap-tide", 401),
        ("bob:spring-tide", 401),
        ("amy:", 401),
        ("amy", 401),
    ] {
        for _ in 0..2 {
            let reply = server.get("/metrics", &basic(credentials));
            assert_eq!(reply.status, status, "{credentials}");
        }
    }
    for method in ["HEAD", "POST"] {
        assert_eq!(server.request(method, "/metrics", "").status, 401);
    }
}

/// A client at an address of its own.
fn connect_from(server: &Running, last: u8) -> TcpStream {
    let domain = socket2::Domain::IPV4;
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, last], 0));
    socket.bind(&address.into()).unwrap();
    socket.connect(&server.address.into()).unwrap();
    socket.into()
}

/// Six users who were not there before, while ten addresses guess as fast as
/// they get answers, with four requests at once each.
#[test]
fn ten_guessing_addresses_starve_nobody() {
    use std::fmt::Write as _;

    let kit = Kit::new();
    let mut config = String::from("basic_auth_users:\n");
    for user in 0..6 {
        let hash = bcrypt::hash(format!("spring-tide {user}"), 7).unwrap();
        writeln!(config, "  amy{user}: {hash}").unwrap();
    }
    let server = kit.run(&config);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (last, at) in (11..=20).flat_map(|last| (0..4).map(move |at| (last, at))) {
            let (server, done) = (&server, &done);
            scope.spawn(move || {
                for number in 0.. {
                    if done.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    let mut stream = connect_from(server, last);
                    let wrong = basic(&format!("amy0:{at} {number}"));
                    let request = format!(
                        "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{wrong}\r\n"
                    );
                    if stream.write_all(request.as_bytes()).is_ok() {
                        // Whatever the answer is.
                        let _ = stream.read_to_end(&mut Vec::new());
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(500));
        let statuses: Vec<_> = (0..6)
            .map(|user| {
                let right = basic(&format!("amy{user}:spring-tide {user}"));
                server.get("/metrics", &right).status
            })
            .collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(statuses, [200; 6]);
    });
}

/// Guesses wait for bcrypt; who is known does not wait for them.
#[test]
fn guessing_does_not_delay_who_is_known_nor_health() {
    let kit = Kit::new();
    let hash = bcrypt::hash("spring-tide", 8).unwrap();
    let server = kit.run(&format!("basic_auth_users:\n  amy: {hash}\n"));
    let known = basic("amy:spring-tide");
    assert_eq!(server.get("/metrics", &known).status, 200);
    let guesses: Vec<_> = (0..15)
        .map(|number| {
            let mut stream = server.connect();
            write!(
                stream,
                "GET /metrics HTTP/1.1\r\nHost: x\r\n{}\r\n",
                basic(&format!("amy:{number}"))
            )
            .unwrap();
            stream
        })
        .collect();
    let began = std::time::Instant::now();
    for _ in 0..5 {
        assert_eq!(server.get("/metrics", &known).status, 200);
        assert_eq!(server.get("/-/healthy", "").status, 200);
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    drop(guesses);
}

#[test]
fn headers_are_set_and_removed() {
    let kit = Kit::new();
    let server = kit.run(
        "http_server_config:\n  headers:\n    X-Frame-Options: sameorigin\n    \
         Strict-Transport-Security: max-age=60\n    X-XSS-Protection: 1\n    \
         Content-Security-Policy: \"\"\n",
    );
    for (path, status) in [("/metrics", 200), ("/", 200), ("/x", 404)] {
        let reply = server.get(path, "");
        assert_eq!(reply.status, status);
        assert_eq!(reply.header("x-frame-options"), Some("sameorigin"));
        assert_eq!(
            reply.header("strict-transport-security"),
            Some("max-age=60")
        );
        assert_eq!(reply.header("x-xss-protection"), Some("1"));
        assert_eq!(reply.header("content-security-policy"), None);
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    }
}

#[test]
fn the_rate_limit_lets_a_burst_through() {
    let kit = Kit::new();
    let server = kit.run("rate_limit:\n  interval: 1h\n  burst: 3\n");
    let statuses: Vec<_> = (0..5).map(|_| server.get("/metrics", "").status).collect();
    assert_eq!(statuses, [200, 200, 200, 429, 429]);
    assert_eq!(server.get("/-/healthy", "").status, 200);
    let none = kit.run("rate_limit:\n  interval: 1s\n  burst: 0\n");
    assert_eq!(none.get("/metrics", "").status, 429);
    let off = kit.run("rate_limit:\n  interval: 0\n");
    assert!((0..20).all(|_| off.get("/metrics", "").status == 200));
}

#[test]
fn changed_files_are_used_and_broken_ones_are_not() {
    let kit = Kit::new();
    let (old, new) = (
        bcrypt::hash("old", 4).unwrap(),
        bcrypt::hash("new", 4).unwrap(),
    );
    let with = |hash: &str| format!("{TLS}basic_auth_users:\n  amy: {hash}\n");
    let server = kit.run(&with(&old));
    let status = |credentials: &str| {
        let reply = get(&server, kit.client(None), "/metrics", &basic(credentials));
        reply.map(|reply| reply.status).ok()
    };
    assert_eq!(status("amy:old"), Some(200));
    kit.write("web.yml", &with(&new));
    assert_eq!(status("amy:old"), Some(401));
    assert_eq!(status("amy:new"), Some(200));

    // Broken in every way there is: the old settings stay.
    for broken in [
        "tls_server_config: [",
        "unknown: 1\n",
        "",
        &with("short"),
        &with(&new).replace("server.crt", "nowhere.crt"),
    ] {
        kit.write("web.yml", broken);
        assert_eq!(status("amy:new"), Some(200), "{broken}");
    }
    fs::remove_file(kit.path("web.yml")).unwrap();
    assert_eq!(status("amy:new"), Some(200));
    // Swapped in by rename, as editors and Kubernetes do.
    kit.write("web.yml.new", &with(&old));
    fs::rename(kit.path("web.yml.new"), kit.path("web.yml")).unwrap();
    assert_eq!(status("amy:old"), Some(200));

    // A new certificate of a new authority, key and certificate one after
    // the other; in between, the old pair serves.
    let ca = authority("the next authority");
    kit.server("next", &ca);
    fs::rename(kit.path("next.crt"), kit.path("server.crt")).unwrap();
    assert_eq!(status("amy:old"), Some(200));
    fs::rename(kit.path("next.key"), kit.path("server.key")).unwrap();
    assert_eq!(status("amy:old"), None);
    let config = kit.client_of(None, rustls::DEFAULT_VERSIONS, &ca.pem());
    let reply = get(&server, config, "/metrics", &basic("amy:old")).unwrap();
    assert_eq!(reply.status, 200);
}

/// A file that is being written is empty first; nobody is let in for that.
#[test]
fn an_emptied_file_keeps_the_users() {
    let kit = Kit::new();
    let hash = bcrypt::hash("spring-tide", 4).unwrap();
    let server = kit.run(&format!("basic_auth_users:\n  amy: {hash}\n"));
    for blank in ["", "\n", "# soon\n"] {
        kit.write("web.yml", blank);
        assert_eq!(server.get("/metrics", "").status, 401, "{blank:?}");
    }
    kit.write("web.yml", "{}");
    assert_eq!(server.get("/metrics", "").status, 200);
}

#[test]
fn certificates_are_renewed_beside_a_broken_file() {
    let kit = Kit::new();
    let server = kit.run(TLS);
    kit.write("web.yml", "tls_server_config: [");
    assert!(get(&server, kit.client(None), "/metrics", "").is_ok());
    let ca = authority("the next authority");
    kit.server("next", &ca);
    fs::rename(kit.path("next.key"), kit.path("server.key")).unwrap();
    fs::rename(kit.path("next.crt"), kit.path("server.crt")).unwrap();
    let config = kit.client_of(None, rustls::DEFAULT_VERSIONS, &ca.pem());
    assert_eq!(get(&server, config, "/metrics", "").unwrap().status, 200);
}

#[test]
fn a_handshake_has_to_end() {
    let kit = Kit::new();
    let limits = Limits {
        handshake: Duration::from_millis(500),
        header: Duration::from_millis(1200),
        tick: Duration::from_millis(50),
        ..Limits::default()
    };
    let server = kit.run_with(TLS, limits);
    let cut_after = |stream: &mut dyn std::io::Read| {
        let began = std::time::Instant::now();
        let _ = stream.read(&mut [0; 16]);
        began.elapsed()
    };
    // Silent, or stopping in the middle of a record.
    for first in [&b""[..], b"\x16\x03\x01\x02\x00\x01"] {
        let mut stream = server.connect();
        stream.write_all(first).unwrap();
        let took = cut_after(&mut stream);
        assert!(
            took > Duration::from_millis(300) && took < Duration::from_secs(10),
            "{took:?}"
        );
    }
    // After it, the header has its own time.
    let mut stream = connect(&server, kit.client(None));
    stream.conn.complete_io(&mut stream.sock).unwrap();
    let took = cut_after(&mut stream);
    assert!(
        took > Duration::from_millis(900) && took < Duration::from_secs(10),
        "{took:?}"
    );
}

#[test]
fn slow_readers_are_cut_over_tls_as_well() {
    let kit = Kit::new();
    let server = padded(&kit, 24 << 20);
    let mut stream = connect(&server, kit.client(None));
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let mut bytes = Vec::new();
    // What was in flight, then the end; an error where it was a reset.
    let _ = stream.read_to_end(&mut bytes);
    assert!(
        !bytes.is_empty() && bytes.len() < 24 << 20,
        "{}",
        bytes.len()
    );
}

/// A server of answers of that size, impatient with those who do not read.
fn padded(kit: &Kit, padding: usize) -> Running {
    Start {
        web_config: Some(kit.write("web.yml", TLS)),
        padding,
        limits: Limits {
            write: Duration::from_millis(1500),
            tick: Duration::from_millis(50),
            ..Limits::default()
        },
        ..Start::default()
    }
    .run()
}

#[test]
fn slow_readers_are_cut_over_http2() {
    for padding in [24 << 20, 100 << 10] {
        unread_over_http2(padding);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The client opens no window for more than the first kilobyte.
fn unread_over_http2(padding: usize) {
    let kit = Kit::new();
    let server = padded(&kit, padding);
    runtime().block_on(async {
        let stream = kit.connect(server.address, &[b"h2"]).await;
        let executor = hyper_util::rt::TokioExecutor::new();
        let (mut sender, connection) = hyper::client::conn::http2::Builder::new(executor)
            .initial_stream_window_size(1024)
            .handshake(hyper_util::rt::TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let request = hyper::Request::get("https://localhost/metrics")
            .body(String::new())
            .unwrap();
        let began = std::time::Instant::now();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let ended = tokio::time::timeout(Duration::from_secs(5), connection).await;
        assert!(ended.is_ok(), "the server cuts the connection");
        assert!(
            began.elapsed() > Duration::from_secs(1),
            "{:?}",
            began.elapsed()
        );
        drop(response);
    });
}
