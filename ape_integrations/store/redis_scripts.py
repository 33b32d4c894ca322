"""What a Redis server does in one step on behalf of `RedisKVStore`.

``ape:entry:<id>`` is a hash with the entry's generation, number of chunks and tag;
``ape:chunk:<id>:<generation>:<n>`` are its bytes. ``ape:order`` sorts ids by last use,
``ape:sizes`` has their bytes and ``ape:used`` the sum, so that entries which expired by themselves
can still be accounted for. The scripts derive keys from ids: they need one server, not a cluster.
"""

from __future__ import annotations

_DROP = """
local function drop(id)
  local size = redis.call('HGET', 'ape:sizes', id)
  local entry = redis.call('HMGET', 'ape:entry:' .. id, 'generation', 'chunks')
  if entry[1] then
    for n = 0, tonumber(entry[2]) - 1 do
      redis.call('UNLINK', 'ape:chunk:' .. id .. ':' .. entry[1] .. ':' .. n)
    end
    redis.call('UNLINK', 'ape:entry:' .. id)
  end
  redis.call('ZREM', 'ape:order', id)
  if not size then return 0 end
  redis.call('HDEL', 'ape:sizes', id)
  redis.call('DECRBY', 'ape:used', size)
  return entry[1] and 1 or 0
end
"""

REGISTER = (
    _DROP
    + """
local id, generation, chunks, size, tag = unpack(ARGV, 1, 5)
local ttl, limit = tonumber(ARGV[6]), tonumber(ARGV[7])
local pinned = {}
for n = 8, #ARGV do pinned[ARGV[n]] = true end
drop(id)
local used = tonumber(redis.call('GET', 'ape:used') or 0)
local evicted, rank = 0, 0
while limit > 0 and used + tonumber(size) > limit do
  local oldest = redis.call('ZRANGE', 'ape:order', rank, rank)[1]
  if not oldest then return -1 end
  if pinned[oldest] then
    rank = rank + 1
  else
    evicted = evicted + drop(oldest)
    used = tonumber(redis.call('GET', 'ape:used') or 0)
  end
end
for n = 0, chunks - 1 do
  local chunk = 'ape:chunk:' .. id .. ':' .. generation .. ':' .. n
  if ttl > 0 then redis.call('PEXPIRE', chunk, ttl) else redis.call('PERSIST', chunk) end
end
local entry = 'ape:entry:' .. id
redis.call('HSET', entry, 'generation', generation, 'chunks', chunks, 'size', size, 'tag', tag)
if ttl > 0 then redis.call('PEXPIRE', entry, ttl) end
redis.call('HSET', 'ape:sizes', id, size)
redis.call('INCRBY', 'ape:used', size)
redis.call('ZADD', 'ape:order', redis.call('INCR', 'ape:clock'), id)
return evicted
"""
)
"""Make written chunks an entry. ARGV: id, generation, chunks, bytes, tag, milliseconds to live or
0, limit or 0, pinned ids. Returns the number of entries evicted; -1 where there is no room."""

DROP = _DROP + "return drop(ARGV[1])"
"""Remove the entry with the id ARGV[1]. Returns 1 where there was one."""

TOUCH = """
if redis.call('EXISTS', 'ape:entry:' .. ARGV[1]) == 1 then
  redis.call('ZADD', 'ape:order', 'XX', redis.call('INCR', 'ape:clock'), ARGV[1])
end
"""
"""Note that the entry with the id ARGV[1] was used."""

SWEEP = (
    _DROP
    + """
local prefix, all = ARGV[1], ARGV[2] == '1'
local dropped = 0
for _, id in ipairs(redis.call('ZRANGE', 'ape:order', 0, -1)) do
  local ours = string.sub(id, 1, #prefix) == prefix
  if (all and ours) or redis.call('EXISTS', 'ape:entry:' .. id) == 0 then
    dropped = dropped + drop(id)
  end
end
return dropped
"""
)
"""Forget entries that expired, and where ARGV[2] is 1 remove all whose id starts with ARGV[1].
Returns how many were removed."""
