"""One file per server. `why_not(model)`: why it cannot serve a model here. `command(model, port)`: how it is started.
`READY`: the path that answers with 200 once it can be asked."""
