//! A port-forward as an API server does it over a WebSocket, to an address of this machine in the place of a pod's loopback.
//!
//! Each message begins with the number of its channel: 0 carries bytes, 1 the reason why they cannot be carried. The first message of
//! each says which port it is for, in two bytes, the lower one first.

use std::convert::Infallible;
use std::net::SocketAddr;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::Response;
use futures::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

const DATA: u8 = 0;
const ERROR: u8 = 1;

/// What a request can become, if it is one of a WebSocket.
pub(crate) struct Upgrade(Option<(OnUpgrade, String)>);

impl<S: Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Upgrade, Infallible> {
        let upgrade = parts.extensions.remove::<OnUpgrade>();
        let key = parts.headers.get(header::SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
        Ok(Upgrade(upgrade.zip(key)))
    }
}

/// The answer to the request, after which bytes are carried.
pub(crate) fn begin(Upgrade(upgrade): Upgrade, port: u16, daemon: SocketAddr) -> Response {
    let (upgrade, accept) = upgrade.expect("it is asked for over a WebSocket");
    tokio::spawn(async move {
        let upgraded = TokioIo::new(upgrade.await.unwrap());
        let socket = WebSocketStream::from_raw_socket(upgraded, Role::Server, None).await;
        // That the other side has gone is no failure.
        let _ended = carry(socket, port, daemon).await;
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, accept)
        .header(header::SEC_WEBSOCKET_PROTOCOL, "v4.channel.k8s.io")
        .body(Body::empty())
        .unwrap()
}

fn message(channel: u8, bytes: &[u8]) -> Message {
    Message::binary([&[channel], bytes].concat())
}

type Ended = Result<(), Box<dyn std::error::Error + Send + Sync>>;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Says that this was all, and hears the other side out: a connection that is dropped with bytes nobody has read takes back what was
/// said on it last.
async fn close(mut socket: Socket) -> Ended {
    socket.close(None).await?;
    while let Some(received) = socket.next().await {
        received?;
    }
    Ok(())
}

async fn carry(mut socket: Socket, port: u16, daemon: SocketAddr) -> Ended {
    for channel in [DATA, ERROR] {
        socket.send(message(channel, &port.to_le_bytes())).await?;
    }
    let mut daemon = match TcpStream::connect(daemon).await {
        Ok(daemon) => daemon,
        Err(error) => {
            let why = format!("error forwarding port {port} to pod: {error}\n");
            socket.send(message(ERROR, why.as_bytes())).await?;
            return close(socket).await;
        }
    };
    let mut bytes = vec![0; 32 * 1024];
    loop {
        tokio::select! {
            read = daemon.read(&mut bytes) => match read? {
                0 => return close(socket).await,
                read => socket.send(message(DATA, &bytes[..read])).await?,
            },
            received = socket.next() => match received {
                Some(Ok(Message::Binary(received))) if received.first() == Some(&DATA) => daemon.write_all(&received[1..]).await?,
                Some(Ok(Message::Close(_))) | None => return Ok(()),
                Some(other) => drop(other?),
            },
        }
    }
}
