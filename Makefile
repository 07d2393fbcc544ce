# The two commands for a fresh machine are "make demo" and "make test".
# "make help" lists the rest.

MODULE   := github.com/imagestack/imagestack
PREFIX   ?= /usr/local
DESTDIR  ?=
FUZZTIME ?= 30s
SOAKTIME ?= 30m
# Distinct states after power cuts, at least.
CRASH_STATES ?= 100000
# Packages for test and race; the default is everything.
PKGS     ?= ./...

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Not -buildvcs: it fails in a checkout that belongs to somebody else. Nothing
# is in C: without cgo the tools are static, and need 4 MiB less.
BUILD    := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '-X $(MODULE)/internal/cli.Version=$(VERSION)'

GOLANGCI_VERSION := 2.15.0
TOOLS    := $(CURDIR)/.tools

.PHONY: build test check lint race crash faults soak fuzz bench bench-quick demo install deps clean help

help:
	@echo 'make build        the tools, in bin/'
	@echo 'make test         what the continuous integration runs (root: everything; others: what needs no root)'
	@echo 'make check        gofmt, vet, golangci-lint (with the floors of the house), tests with -race'
	@echo 'make crash        power cuts at every moment of all that changes a file: CRASH_STATES=$(CRASH_STATES) states'
	@echo 'make faults       every command with every fault at every operation (half an hour)'
	@echo 'make soak         1,000 programs on one image; a mounted guest under load for SOAKTIME=$(SOAKTIME)'
	@echo 'make fuzz         every fuzz target for FUZZTIME=$(FUZZTIME)'
	@echo 'make bench        speed beside qemu-storage-daemon and the bare file (bench-quick: minutes less)'
	@echo 'make demo         build, make sample images, mount them, list the files in them'
	@echo 'make install      tools and man pages, to DESTDIR=$(DESTDIR) PREFIX=$(PREFIX)'
	@echo 'make deps         install (root) or name the system packages that the above need'
	@echo 'make clean        remove bin/ and .tools/'

build:
	@mkdir -p bin
	$(BUILD) -o bin/ ./cmd/...

test:
	scripts/deps test
	$(GO) vet $(PKGS)
	scripts/gotest $(PKGS)

check: lint race

lint:
	scripts/lint $(GOLANGCI_VERSION) $(TOOLS)

race:
	scripts/deps test check
	GOTEST_FLAGS=-race scripts/gotest $(PKGS)

crash:
	scripts/deps test
	CRASH_STATES=$(CRASH_STATES) scripts/crash

faults:
	scripts/deps test
	IMAGESTACK_REQUIRE=all $(GO) test ./test -count=1 -timeout 4h -v -run '^TestFaultMatrix$$' -matrix.full

soak:
	scripts/deps test bench
	IMAGESTACK_REQUIRE=all $(GO) test -tags soak ./test -count=1 -timeout 24h -v -run '^(TestLocksUnderFire|TestSoak)$$' -locks.starts 1000 -soak.time $(SOAKTIME)

fuzz:
	scripts/fuzz $(FUZZTIME)

bench:
	scripts/deps bench
	$(GO) run ./bench -full

bench-quick:
	scripts/deps bench
	$(GO) run ./bench -quick

demo:
	scripts/deps demo
	$(MAKE) --no-print-directory build
	scripts/demo

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/man/man8
	for tool in cmd/*/; do install -m 755 "bin/$$(basename "$$tool")" $(DESTDIR)$(PREFIX)/bin/ || exit 1; done
	install -d $(DESTDIR)$(PREFIX)/sbin
	ln -sf ../bin/image-fsck $(DESTDIR)$(PREFIX)/sbin/fsck.imagestack
	install -m 644 man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -m 644 man/*.8 $(DESTDIR)$(PREFIX)/share/man/man8/

deps:
	scripts/deps test check demo bench

clean:
	rm -rf bin .tools
